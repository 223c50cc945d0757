"""Chat templates by name, for a model that comes without one; each as its family published it.

Jinja, rendered in transformers' sandbox, with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.
"""

from pathlib import Path

from jlora.common.errors import UserError

# The answer opens in the prompt and ends with a token of its own.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token or '' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# The answer ends with the model's own end of text, so that any base can learn them.
LLAMA2 = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = '<<SYS>>\\n' + message.content | trim + '\\n<</SYS>>\\n\\n' %}
{%- elif message.role == 'user' %}
{{- (bos_token or '') + '[INST] ' + ns.system + message.content | trim + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}
{{- ' ' + message.content | trim + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""

MISTRAL = """\
{{- bos_token or '' }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = message.content | trim + '\\n\\n' %}
{%- elif message.role == 'user' %}
{{- '[INST] ' + ns.system + message.content | trim + ' [/INST]' }}{% set ns.system = '' %}
{%- else %}
{{- ' ' + message.content | trim + eos_token }}
{%- endif %}
{%- endfor %}"""

VICUNA = """\
{{- bos_token or '' }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content | trim + ' ' }}
{%- elif message.role == 'user' %}
{{- 'USER: ' + message.content | trim + ' ' }}
{%- else %}
{{- 'ASSISTANT: ' + message.content | trim + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

ALPACA = """\
{{- bos_token or '' }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content | trim + '\\n\\n' }}
{%- elif message.role == 'user' %}
{{- '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
{%- else %}
{{- '### Response:\\n' + message.content | trim + eos_token + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}"""

TEMPLATES = {
    "alpaca": ALPACA,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "vicuna": VICUNA,
}


def find_template(chat_template: str) -> str:
    """The template that the key `chat_template` names: one of TEMPLATES, or a file.

    Raises:
      UserError: neither; both are listed.
    """
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template={chat_template!r}: expected one of {', '.join(TEMPLATES)}, or a file with a Jinja "
            f"template ({error})"
        ) from None
