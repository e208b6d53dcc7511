"""The chat template gets each conversation in a form that it knows."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest

from infer_align.config import Limits
from infer_align.decoding.labels import LabelQuery
from infer_align.engines.transformers.prompt import render
from infer_align.errors import InvalidRequest, Unsupported
from infer_align.flow.plan import make_plan
from infer_align.flow.request import parse_request

STRICT = (
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}:"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPPING = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER = {"role": "user", "content": "hi"}
BEGUN = {"role": "assistant", "content": "The c"}


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": "Be brief."}, USER], "[user]Be brief.\n\nhi[assistant]"),
        ([{"role": "developer", "content": "Be brief."}, USER], "[user]Be brief.\n\nhi[assistant]"),
        ([USER, USER], "[user]hi\n\nhi[assistant]"),
        ([USER, BEGUN, BEGUN, USER], "[user]hi[assistant]The c\n\nThe c[user]hi[assistant]"),
    ],
)
def test_a_strict_template_gets_roles_that_it_knows(byte_level, messages, text):
    assert render(with_template(byte_level, STRICT), {"messages": messages}) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"city": "Paris"}', "city=Paris;"),
        ("", ""),
        (None, ""),
        ("{broken", ""),
        ({"a": 1}, "a=1;"),
    ],
)
def test_a_template_can_walk_through_the_arguments_of_a_call(byte_level, arguments, text):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "21"}]},
    ]
    rendered = render(with_template(byte_level, WITH_TOOLS), {"messages": messages})
    assert rendered == f"[user]hi[assistant]f:{text}[tool]21[assistant]"


def test_null_fields_and_thinking_are_left_out(byte_level):
    thinking = {"type": "thinking", "thinking": "hm"}
    parts = [thinking, {"type": "refusal", "refusal": "no"}]
    messages = [USER, {"role": "assistant", "content": parts, "tool_calls": []}, USER]
    rendered = render(with_template(byte_level, WITH_TOOLS), {"messages": messages})
    assert rendered == "[user]hi[assistant]no[user]hi[assistant]"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "[user]hi[assistant]The c[assistant]"),
        ({"continue_final_message": True}, "[user]hi[assistant]The c"),
        (
            {"continue_final_message": True, "add_generation_prompt": False},
            "[user]hi[assistant]The c",
        ),
        ({"add_generation_prompt": False}, "[user]hi[assistant]The c"),
        ({"add_generation_prompt": True}, "[user]hi[assistant]The c[assistant]"),
    ],
)
def test_an_answer_that_the_client_began_is_continued(byte_level, fields, text):
    body = {"messages": [USER, BEGUN], **fields}
    assert render(with_template(byte_level, WITH_TOOLS), body) == text


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([USER], {"continue_final_message": True}, "continue_final_message"),
        (
            [USER, BEGUN],
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ([USER, BEGUN], {"continue_final_message": "yes"}, "continue_final_message"),
        ([USER, BEGUN], {"add_generation_prompt": 5}, "add_generation_prompt"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(byte_level, messages, fields, param):
    with pytest.raises(InvalidRequest) as refused:
        render(byte_level, {"messages": messages, **fields})
    assert refused.value.param == param


@pytest.mark.anyio
async def test_a_judge_reads_through_a_template_without_a_system_role(
    serving, language_model, tmp_path
):
    shutil.copytree(language_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    prompt = ({"role": "system", "content": "Rate it."}, USER)
    folded = ({"role": "user", "content": "Rate it.\n\nhi"},)
    async with serving(model=str(tmp_path)) as engine:
        answers = [
            await engine.read_labels(LabelQuery(m, "Score: [", ("1", "2")))
            for m in (prompt, folded)
        ]
    assert answers[0].logprobs == answers[1].logprobs


@pytest.mark.anyio
async def test_a_direction_is_refused_where_the_model_would_not_see_it(
    serving, language_model, tmp_path
):
    shutil.copytree(language_model(), tmp_path, dirs_exist_ok=True)
    template = tmp_path / "chat_template.jinja"
    request = parse_request(
        {"messages": [USER], "align": {"dpa": {"direction": {"helpfulness": 1}}}}, "chat", {}
    )
    for text, is_seen in ((DROPPING, False), (STRICT, True)):
        template.write_text(text)
        async with serving(model=str(tmp_path)) as engine:
            if is_seen:
                assert make_plan(request, engine, {}, {}, Limits()).direction
            else:
                with pytest.raises(Unsupported, match=r'set \[dpa\] placement = "user"') as error:
                    make_plan(request, engine, {}, {}, Limits())
                assert error.value.param == "align.dpa"


@pytest.mark.anyio
async def test_a_request_renders_the_template_once(serving, language_model, tmp_path, monkeypatch):
    shutil.copytree(language_model(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(STRICT)
    request = parse_request({"messages": [USER], "max_tokens": 1}, "chat", {})
    renderings = []
    async with serving(model=str(tmp_path)) as engine:
        tokenizer = engine.frozen.tokenizer
        render_template = tokenizer.apply_chat_template

        def count(*arguments: Any, **options: Any) -> Any:
            renderings.append(render_template(*arguments, **options))
            return renderings[-1]

        monkeypatch.setattr(tokenizer, "apply_chat_template", count)
        plan = make_plan(request, engine, {}, {}, Limits())
        (draw,) = plan.draws
        await engine.generate(draw)
    assert renderings == ["[user]hi[assistant]"]
