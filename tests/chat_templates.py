"""Chat templates with the structure of known model families: where each puts reasoning, tools, calls and the date."""

# Reasoning of earlier turns is removed; the last answer gets an empty block if it has none; there is a switch.
QWEN3 = """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '<tools>' }}
{%- for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought, words = m.reasoning_content or '', m.content %}
{%- if not thought and '</think>' in m.content %}
{%- set thought, words = m.content.split('</think>')[0].split('<think>')[-1], m.content.split('</think>')[-1] %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.asked and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + words.lstrip('\\n') }}
{%- else %}{{ words.lstrip('\\n') }}{% endif %}
{%- for c in m.tool_calls or [] %}
{{- '\\n' if words or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# The prompt opens the reasoning, and nothing can turn it off.
QWEN3_THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    "{{- '<think>\\n' }}",
)

# The prompt opens the reasoning; of every answer, all up to </think> is cut. Arguments are JSON text.
R1 = """\
{{- bos_token }}
{%- for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}
{%- set ns = namespace(result=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{% set ns.result = false %}
{%- elif m.role == 'tool' %}{{ '<|output|>' + m.content + '<|end_output|>' }}{% set ns.result = true %}
{%- elif m.role == 'assistant' %}
{%- if m.tool_calls %}
{{- '<|Assistant|>' }}
{%- for c in m.tool_calls %}
{{- '<|call|>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```' }}
{%- endfor %}
{{- eos_token }}
{%- endif %}
{%- if m.content is defined and m.content is not none %}
{{- ('' if ns.result else '<|Assistant|>') + m.content.split('</think>')[-1] + eos_token }}
{%- set ns.result = false %}
{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.result %}{{ '<|Assistant|><think>\\n' }}{% endif %}"""

# System message and tools stand at the last question, and only while it is the last turn. Ids have nine characters.
MISTRAL_V7 = """\
{{- bos_token }}
{%- set ns = namespace(asked=-1, system='') %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}
{%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.asked %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (ns.system if loop.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' and m.tool_calls is defined %}
{{- '[TOOL_CALLS][' }}
{%- for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('Tool call IDs must have 9 characters!') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + m.content | tojson + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

# States the date; tools stand in the first question; one call a turn; a call ends with the same token as an answer.
LLAMA31 = """\
{{- bos_token }}
{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- set said = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + said + '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
{%- if tools and loop.index0 <= 1 %}{% for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}
{{- m.content | trim + '<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('Only single tool calls are supported!') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Tools in a system message; calls between tags; results with the role tool.
HERMES = """\
{%- if tools %}
{{- '<|im_start|>system\\nYou may call: <tools>' }}{% for t in tools %}{{ t.function | tojson }}{% endfor %}
{{- '</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>tool\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- for c in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# States the date and the mode in its system message; reasoning stands in the content; it has no calls.
SMOLLM3 = """\
{%- set thinks = enable_thinking is not defined or enable_thinking %}
{{- '<|im_start|>system\\nToday Date: ' + strftime_now('%-d %B %Y') + ('\\n/think' if thinks else '\\n/no_think') }}
{{- ('\\n' + messages[0].content if messages[0].role == 'system' else '') + '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') + m.content.lstrip('\\n') }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' + ('' if thinks else '<think>\\n\\n</think>\\n') }}
{%- endif %}"""

MARKUP = """<s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> [INST] [/INST]
[AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|User|> <|Assistant|> <|call|>
<|output|> <|end_output|>""".split()
ENDS = {"llama31": "<|eot_id|>", "mistral": "</s>", "r1": "</s>"}  # of the others: <|im_end|>
FAMILIES = {
    "qwen3": QWEN3,
    "qwen3-thinking": QWEN3_THINKING,
    "r1": R1,
    "mistral": MISTRAL_V7,
    "llama31": LLAMA31,
    "hermes": HERMES,
    "smollm3": SMOLLM3,
}
