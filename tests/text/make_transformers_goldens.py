"""Writes chat_transformers.json: chats, and the prompts that transformers' apply_chat_template makes.

  pip install transformers
  python tests/text/make_transformers_goldens.py

The templates have the traits of real ones: ChatML with tools and thinking (as Qwen), headers (Llama
3), parts (Gemma), control tokens and loop controls (Mistral). Arguments of tool calls are given as
objects, which the templates expect; that those in strings give the same is tested beside it.
"""

import json
from pathlib import Path

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'Functions:' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last == 0 %}
        {%- set ns.last = messages | length - loop.index0 - 1 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- '\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>' }}
        {%- endif %}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nDate: ' + date + '\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system }}{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {%- for name, value in call.arguments | items %}{{ name }}={{ value | tojson }};{%- endfor %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

PARTS = """\
{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}{{ mask_token is defined }}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role }}
    {% if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}|
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>' }}
{% endfor -%}
{%- if add_generation_prompt -%}<start_of_turn>model
{% endif -%}
"""

CONTROLS = """\
{%- set calls = namespace(number=0) -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- if message.role == 'stop' %}{%- break %}{%- endif %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | map(attribute='function') | list | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function | tojson(sort_keys=True, separators=(',', ':')) %}
            {%- set calls.number = calls.number + 1 %}
            {{- out[:-1] }}{{- ',"id":"%09d"}' % calls.number }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- else %}
        {%- generation %}{%- set text = message['content'] | trim %}{{ ' ' + text }}{%- endgeneration %}
        {{- eos_token if text is not defined }}
    {%- endif %}
{%- endfor %}
"""

TOOLS = [
    {"type": "function", "function": {
        "name": "grüßen", "description": "Says \"hi\" & <bye>.", "parameters": {
            "type": "object", "required": [], "properties": {
                "wer": {"type": ["string", "null"], "default": None, "enum": ["ä", "'b'"]}}}}},
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

ASK = [{"role": "user", "content": "  Wie geht's? 日本 😀 <b>&amp;\n"}]
TALK = [{"role": "system", "content": "Be brief. "}, *ASK,
        {"role": "assistant", "content": "Good.\n", "name": "x"}, {"role": "user", "content": "And?"}]
CALLS = [{"role": "user", "content": "sum"},
         {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "\nHm.\n",
          "tool_calls": [{"id": "c1", "type": "function", "function": {
              "name": "add", "arguments": {"a": 1, "list": ["é", {"q": "\"<\""}], "x": 1.5, "t": True}}}]},
         {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "{\"sum\": 2}"}]
TWO_CALLS = [*CALLS[:1], {**CALLS[1], "tool_calls": [
    *CALLS[1]["tool_calls"], {"type": "function", "function": {"name": "f", "arguments": {}}}]},
             CALLS[2], {"role": "tool", "tool_call_id": "c2", "content": "5"},
             {"role": "assistant", "content": "Done", "thinking": "ok"}, {"role": "user", "content": "ok"}]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c "}, *ASK]
STOPPED = [*TALK, {"role": "stop", "content": ""}, {"role": "user", "content": "never"}]

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "parts": PARTS, "controls": CONTROLS}
CASES = [
    *[("chatml", chat, tools, {}) for chat in (ASK, TALK, CALLS, TWO_CALLS) for tools in (None, TOOLS)],
    ("chatml", ASK, None, {"enable_thinking": False}), ("chatml", ASK, None, {"enable_thinking": True}),
    ("chatml", TALK, TOOLS, {"add_generation_prompt": False}),
    *[("headers", chat, tools, {"date": "1 Jan"}) for chat in (ASK, TALK, CALLS) for tools in (None, TOOLS)],
    ("headers", ASK, TOOLS, {"date": "2 Jan", "custom_tools": TOOLS[1:]}),
    ("parts", IN_PARTS, None, {}), ("parts", TALK, None, {}), ("parts", TALK, None, {"pad_token": "<mine>"}),
    *[("controls", chat, tools, {}) for chat in (ASK, TALK, TWO_CALLS, STOPPED) for tools in (None, TOOLS)],
]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
                  "image_token": "<image>"}


def main() -> None:
  import tokenizers
  import transformers

  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)
  cases = []
  for name, messages, tools, names in CASES:
    options = {"add_generation_prompt": True, **names}
    text = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=TEMPLATES[name], tokenize=False, **options)
    cases.append({"template": name, "messages": messages, "tools": tools, "names": options,
                  "text": text})
  goldens = {"templates": TEMPLATES, "special_tokens": SPECIAL_TOKENS, "cases": cases}
  with Path(__file__).with_name("chat_transformers.json").open("w", encoding="utf-8") as file:
    json.dump(goldens, file, ensure_ascii=False, indent=1)
    file.write("\n")


if __name__ == "__main__":
  main()
