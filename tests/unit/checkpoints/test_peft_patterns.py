"""`rank_pattern` and `alpha_pattern` choose as PEFT does, in bounded time whatever they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops.checkpoints.peft_config import read_number
from mlops.checkpoints.peft_patterns import MAX_KEY_LENGTH, ModulePatterns
from mlops.errors import PackagingError

Q = "model.layers.0.self_attn.q_proj"


def patterns(values: Any) -> ModulePatterns:
    return ModulePatterns(Path("adapter"), "alpha_pattern", values, read_number)


def of_peft(keys: list[str], name: str) -> str | None:
    """`get_pattern_key` and the look-up after it, of peft 0.21."""
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", name):
            return key
    return name if name in keys else None


@pytest.mark.parametrize(
    "key",
    [
        "q_proj", "self_attn.q_proj", f"^{Q}", f"^{Q}$", Q.replace(".", r"\."), "^self_attn.q_proj",
        "j", "v_proj", "attn.q_proj", "self.attn.q.proj", r".*\.layers\.0\..*", r"layers\.(0|1)\.q",
        r"layers\.\d+\.self_attn\.(q|k|v)_proj", r"layers\.[1-9]\..*q_proj", "q_proj|v_proj",
        r"(?:mlp|self_attn)\.[a-z]+_proj", r"[^.]+\.q_proj", r"\w+", r"\w+?_proj", "(q|k)?_proj",
        r"layers\.0{1,3}\..*", r"layers\.0{2,}\..*", r"model\..*|lm_head", "a)|(model", "", ".",
        "^", r"\Amodel.*", r".*proj\Z", r"(((.*)))", "(?P<a>q)_proj", r"[\w.]*", r"[^\d]*", "$",
        r"\D+q_p.*",
        "(.*)*", "(a*)*b", "[[a]", "x{0}q_proj", "(q_proj)?", ".{5,}", "(?:)*q_proj", "Q_PROJ",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_a_key_matches_where_it_does_in_peft(key: str) -> None:
    for name in (Q, "lm_head", "model.layers.11.mlp.down_proj", "q_proj", "transformer.h.0.c_attn"):
        theirs = of_peft([key], name)
        assert patterns({key: 3}).find(name) == (None if theirs is None else 3), (key, name)


ATOMS = st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c.]", "^", "$"])


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        several.map("".join),
        several.map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    )


@given(
    keys=st.lists(st.recursive(ATOMS, nested, max_leaves=6), min_size=1, max_size=3, unique=True),
    name=st.text("abc.1", min_size=1, max_size=6),
)
def test_any_keys_choose_as_they_do_in_peft(keys: list[str], name: str) -> None:
    found = patterns(dict(zip(keys, (1, 2, 3), strict=False))).find(name)
    theirs = of_peft(keys, name)
    assert found == (None if theirs is None else keys.index(theirs) + 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"q_proj": 1, Q: 2}, 1),
        ({Q: 2, "q_proj": 1}, 2),
        ({r".*proj": 1, "q_proj": 2}, 1),
        ({"k_proj": 1, r"layers\.\d+\..*": 2, ".*": 3}, 2),
        ({"k_proj": 1}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_first_key_that_matches_decides(values: Any, expected: float | None) -> None:
    assert patterns(values).find(Q) == expected


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("(a", "no regular expression"),
        ("*", "no regular expression"),
        ("a**", "no regular expression"),
        ("(?i)a", "no regular expression"),
        ("(?=q)q_proj", "assert in regular expressions is not supported"),
        ("(?<!q)q_proj", "assert_not"),
        (r"(.)\3", "groupref"),
        ("(?i:Q)_proj", "flags"),
        (r"\bq_proj", "at_boundary"),
        ("a" * (MAX_KEY_LENGTH + 1), "a key of 513 characters; 512 are read"),
        *([("(?>a*)b", "atomic"), ("a*+b", "possessive")]),
    ],
)
def test_what_is_not_followed_is_refused_by_name(key: str, told: str) -> None:
    with pytest.raises(PackagingError, match="alpha_pattern in adapter_config.json") as caught:
        patterns({key: 1})
    assert told in caught.value.message
    assert caught.value.details["setting"] == "alpha_pattern"


@pytest.mark.parametrize(
    "key",
    ["(a+)+$x", "(a*)*b", "(a|a)*b", "(.*)*(.*)*(.*)*b", "(a?){400}a{400}b", "a.*a.*a.*a.*a.*b"],
)
def test_what_takes_forever_elsewhere_is_answered_at_once(key: str) -> None:
    """Each would take Python's own matcher longer than anybody waits."""
    assert patterns({key: 1}).find("a" * 500) is None


@pytest.mark.parametrize("key", ["(((a*)*b*)*c*)*d", "a." * 255])
def test_work_is_bounded_over_all_keys_and_modules(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlops.checkpoints.peft_patterns.MAX_STEPS", 10_000)
    several = patterns({f"{key}{number}": 1 for number in range(50)})
    with pytest.raises(PackagingError, match="takes too long to match: write the names"):
        for number in range(100):
            several.find("a." * 300 + str(number))


def test_a_key_for_each_module_is_within_the_bound() -> None:
    """As EVA writes them, for a model of 126 layers."""
    names = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(126) for x in "qkvogud"]
    several = patterns({name: number for number, name in enumerate(names)})
    assert [several.find(name) for name in names[::9]] == list(range(len(names)))[::9]
