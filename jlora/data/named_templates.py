"""Chat templates by name, for a base model that comes without one; each as its model family publishes it.

They are Jinja, rendered in transformers' sandbox with `messages`, `add_generation_prompt`, `bos_token`, `eos_token`.
"""

from pathlib import Path

from jlora.common.errors import UserError

# In these two, the prompt contains the answer's opening, and a token of its own ends the answer.
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

# In the others, the model's own end-of-text token ends the answer, so any base model can learn them.
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
    """Returns the template that the key `chat_template` selects: one of TEMPLATES, or the content of a file.

    Raises:
      UserError: it is neither.
    """
    if chat_template in TEMPLATES:
        return TEMPLATES[chat_template]
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"chat_template={chat_template!r} is neither a known name nor a readable file ({error}). Expected "
            f"{', '.join(TEMPLATES)}, or the path of a Jinja template."
        ) from None
