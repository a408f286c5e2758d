"""Our own chat templates, in Jinja as tokenizers have theirs, with `{% generation %}` around what the model writes.

`mistral` is Mistral's first instruct format, token for token mistral-common's v1: its marks are text, so that any
tokenizer has it. `chatml` needs the tokens <|im_start|> and <|im_end|>. `plain` has no marks: contents end to end, a
blank line between two turns that aren't the assistant's, an end of sequence behind each answer.
"""

from __future__ import annotations

from moe.config import TemplateName

MISTRAL = """{{- bos_token -}}
{%- set ns = namespace(system='', text='', begun=false) -%}
{%- for message in messages if message['role'] == 'system' and message['content'] -%}
  {%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] -%}
{%- endfor -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system else '') -%}
{%- for message in messages -%}
  {%- set role = message['role'] -%}
  {%- if role not in ['system', 'user', 'assistant'] or message['tool_calls'] or tools -%}
    {{- raise_exception('it has no tools: remove the tool turns, or use a template with tools') -}}
  {%- endif -%}
  {%- if role == 'system' and not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}
    {{- raise_exception('a system message must not follow an assistant turn') -}}
  {%- endif -%}
  {%- if role != 'system' -%}
    {%- if role == 'assistant' and not ns.begun -%}
      {{- '[INST] ' + ns.system + ' [/INST]' -}}
      {%- set ns.system = '' -%}
    {%- endif -%}
    {%- set ns.begun = true -%}
    {%- if message['content'] -%}
      {%- set ns.text = ns.text + ('\\n\\n' if ns.text else '') + message['content'] -%}
    {%- endif -%}
    {%- if loop.last or messages[loop.index0 + 1]['role'] != role -%}
      {%- if role == 'user' -%}
        {{- '[INST] ' + ns.system + ns.text + ' [/INST]' -}}
        {%- set ns.system = '' -%}
      {%- else -%}
        {%- generation -%}{{- ' ' + ns.text + eos_token -}}{%- endgeneration -%}
      {%- endif -%}
      {%- set ns.text = '' -%}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""

CHATML = """{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] or message['tool_calls'] or tools -%}
    {{- raise_exception('it has no tools: remove the tool turns, or use a template with tools') -}}
  {%- endif -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PLAIN = """{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] not in ['system', 'user', 'assistant'] or message['tool_calls'] or tools -%}
    {{- raise_exception('it has no tools: remove the tool turns, or use a template with tools') -}}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- '\\n\\n' if not loop.first and messages[loop.index0 - 1]['role'] != 'assistant' else '' -}}
    {{- message['content'] -}}
  {%- endif -%}
{%- endfor -%}
"""

OURS = {TemplateName.mistral: MISTRAL, TemplateName.chatml: CHATML, TemplateName.plain: PLAIN}
NEEDED_TOKENS = {TemplateName.chatml: ("<|im_start|>", "<|im_end|>")}
