"""Chat turns against transformers, on the templates of the families in a few lines each."""
import json
import re
from datetime import datetime
from unittest import mock

import pytest

from data.prompt import (SOLVE, TEMPLATES, build_prompt, chat_turns, question_prompt, solve_prompt,
                         template_ids)
from data.tokenizer import Tokenizer

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are named SmolLM<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}{{- tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
""" + CHATML
QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
           and not(message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
    {%- endif %}
{%- endfor %}
""" + CHATML.rstrip().removesuffix("{%- endif %}") + """
    {% if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA3 = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] \
+ '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LLAMA32 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
""" + LLAMA3.replace("{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}", "")
R1 = """{% set ns = namespace(is_tool=false, system_prompt='') %}{%- for message in messages %}\
{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}\
{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}\
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}{%- endfor -%}\
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""
# Marks of what to train on, and a break out of a loop, as in SmolLM3.
MARKED = CHATML.replace("{%- endfor", """{%- if message.role == 'assistant' %}
        {% generation %}{{- message.content }}{% endgeneration %}{% break %}
    {%- endif %}
{%- endfor""")
# Llama 2's turns: it strips what a user says, and puts blanks of its own around it.
LLAMA2 = """{% for message in messages %}{{ bos_token + '[INST] ' + message['content'].strip() \
+ ' [/INST]' }}{% endfor %}"""
# A date without asking whether there is a clock, as in SmolLM3 and Mistral Small.
DATED = """{{- 'Today Date: ' ~ strftime_now("%d %B %Y") ~ '\\n' -}}""" + CHATML
# A thought that the template opens with an empty line.
OPENED = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n\\n' }}")
FAMILIES = dict(smollm2=SMOLLM2, qwen25=QWEN25, qwen3=QWEN3, llama3=LLAMA3, llama32=LLAMA32, r1=R1,
                marked=MARKED, llama2=LLAMA2, dated=DATED, opened=OPENED)
SPECIAL = """<|bos|> </think> <think> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|>
    <|eot_id|> <｜User｜> <｜Assistant｜>""".split()
BOS = 600
BOS_IN_FRONT = dict(
    type="TemplateProcessing", special_tokens={"<|bos|>": dict(
        id="<|bos|>", ids=[BOS], tokens=["<|bos|>"])},
    single=[{"SpecialToken": dict(id="<|bos|>", type_id=0)}, {"Sequence": dict(id="A", type_id=0)}],
    pair=[{"Sequence": dict(id="A", type_id=0)}, {"Sequence": dict(id="B", type_id=1)}])


@pytest.fixture(scope="module")
def plain():
    return Tokenizer.load("embedded")


def save(folder, plain, template=None, bos=True):
    """A folder with an embedded tokenizer that knows all turns."""
    special = {text: BOS + i for i, text in enumerate(SPECIAL)}
    # It joins line ends, as Qwen's does.
    ranks = plain.ranks | {b"\n\n": BOS - 1}
    pattern = r"\s*[\r\n]+|" + plain.pattern
    Tokenizer(ranks, special, pattern, eos="<|im_end|>").save(folder)
    source = json.loads((folder / "tokenizer.json").read_text())
    source["post_processor"] = BOS_IN_FRONT if bos else None
    (folder / "tokenizer.json").write_text(json.dumps(source))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= dict(bos_token="<|bos|>", **(dict(chat_template=template) if template else {}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def oracle(folder, content):
    """The ids of transformers, on the day that stands in Llama's template."""
    transformers = pytest.importorskip("transformers")
    with mock.patch("transformers.utils.chat_template_utils.datetime") as clock:
        clock.now.return_value = datetime(2024, 7, 26)
        return transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [dict(role="user", content=content)], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_those_of_transformers_and_the_thought_is_opened_once(plain, tmp_path, family):
    tokenizer = Tokenizer.load(save(tmp_path, plain, FAMILIES[family]))
    opened = tokenizer.encode("<think>\n", special=True)
    for question in ("What is 2+2?", "\n\n Which digit? ", " x"):
        expected = oracle(tmp_path, question + SOLVE)
        if opened[0] not in expected[-2:]:
            expected += opened
        assert solve_prompt(tokenizer, question) == expected
        assert expected.count(opened[0]) == 1
    for name, (before, after) in TEMPLATES.items():
        if name != "short":
            marked = oracle(tmp_path, before + "<|eot_id|>" + after)
            ours = build_prompt([tokenizer.special["<|eot_id|>"]], *template_ids(tokenizer, name), 9999)
            assert ours == (marked if opened[0] in marked[-2:] else marked + opened), name


def test_the_context_stays_ids_between_turns_that_trim(plain, tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, plain, LLAMA32))
    context = [65, 66, *tokenizer.encode(" \n")]  # no text tokenises to these ids
    before, after = template_ids(tokenizer, "v0")
    assert build_prompt(context, before, after, 9999) == before + context + after
    assert before[:2] == [tokenizer.special["<|bos|>"], tokenizer.special["<|start_header_id|>"]]
    assert b"Today Date: 26 Jul 2024\n\n<|eot_id|>" in tokenizer.decode_bytes(before)


def test_a_template_in_a_file_of_its_own_or_in_a_list_is_followed(plain, tmp_path):
    expected = template_ids(Tokenizer.load(save(tmp_path / "text", plain, QWEN25)), "v0")
    named = [dict(name="tool_use", template="x"), dict(name="default", template=QWEN25)]
    assert template_ids(Tokenizer.load(save(tmp_path / "list", plain, named)), "v0") == expected
    folder = save(tmp_path / "file", plain, "{{ 'not this one' }}")
    (folder / "chat_template.jinja").write_text(QWEN25)
    assert template_ids(Tokenizer.load(folder), "v0") == expected


@pytest.mark.parametrize("template, reason", [
    ("{{ raise_exception('only\ntools') }}", "only tools"),
    ("{{ messages[0].content }}{{ 1 / 0 }}", "division"),
    ("{{ messages[0].content }}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ now('%Y') }}{{ messages[0].content }}", "'now' is undefined"),
    ("{{ messages[0].content.lstrip() }}", "changes what a user says"),
    ("{{ messages[0].content.rstrip('\n') }}", "changes what a user says"),
    ("{% for %}", "Expected"),
    ("{{ messages[0].content + none }}", "concatenate"),
    ("{{ messages[0].role }}", "does not write once"),
    ("{{ messages[0].content }}{{ messages[0].content }}", "does not write once"),
    ("{{ messages.append(1) }}", "not callable|unsafe"),
    ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "unsafe"),
])
def test_a_template_that_cannot_be_followed_is_named_once(plain, tmp_path, capsys, template, reason):
    tokenizer = Tokenizer.load(save(tmp_path, plain, template))
    usual = Tokenizer.load(save(tmp_path / "usual", plain))
    for _ in range(2):
        assert template_ids(tokenizer, "v0") == template_ids(usual, "v0")
    [line] = capsys.readouterr().err.splitlines()
    assert "chat template cannot be followed" in line and re.search(reason, line)
    assert repr(chat_turns(usual).user) in line


def test_bos_is_in_front_of_every_prompt_once(plain, tmp_path):
    bos = BOS
    with_bos = Tokenizer.load(save(tmp_path / "with", plain))
    without = Tokenizer.load(save(tmp_path / "without", plain, bos=False))
    for name in TEMPLATES:
        before, after = template_ids(without, name)
        assert bos not in before
        assert template_ids(with_bos, name) == ([bos, *before], after)
    assert question_prompt(with_bos, "x", "short") == [bos, *question_prompt(without, "x", "short")]
    # A context that has lost its beginning stands behind it, too.
    assert build_prompt(list(range(50)), *template_ids(with_bos, "short"), 4) == [bos, 48, 49, bos + 2]
    # A template of the checkpoint decides for itself, as in transformers.
    for template, count in ((CHATML, 0), (R1, 1)):
        own = Tokenizer.load(save(tmp_path / "own", plain, template))
        assert template_ids(own, "v0")[0].count(bos) == oracle(tmp_path / "own", "x").count(bos) == count
