"""Chat templates in the manner of published models, and the tokens that each needs."""

from __future__ import annotations

# Llama 3: the token before a text is the template's own business; what is said is trimmed.
LLAMA3 = """\
{% for message in messages %}
{% set said = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
   + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set said = bos_token + said %}{% endif %}
{{- said -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}"""

# Qwen 2.5: a system's words of its own where there are none, tools, and a namespace.
QWEN = """\
{%- set seen = namespace(users=0) %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- elif message.role == 'user' %}{%- set seen.users = seen.users + 1 %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Qwen3: the last answer is preceded by thoughts, earlier ones lose theirs.
THINKING = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1] %}
        {%- if loop.last %}{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}{%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- generation %}{{- content }}{%- endgeneration %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Llama 2: no roles, no prompt for an answer; the system's words stand in the first question.
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}
{% set told = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set told = '' %}{% endif %}
{% for message in rest %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate') }}{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (told if loop.index0 == 0 else '') + message['content'] | trim
   + ' [/INST]' -}}
{% else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""

TEMPLATES = {"llama3": LLAMA3, "qwen": QWEN, "thinking": THINKING, "llama2": LLAMA2}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
          "<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"]  # fmt: skip
