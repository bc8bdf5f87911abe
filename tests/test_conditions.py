"""--cond PATH[,key=value...]."""

import pytest
from controlnet.model.work.condition import KEYS, ConditionFlag, parse_condition
from controlnet.preprocessors.errors import UsageError
from hypothesis import given
from hypothesis import strategies as st

number = st.floats(0, 1, allow_nan=False).map(lambda v: round(v, 3))
path = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda p: not any(f",{key}=" in p for key in KEYS)
)
word = st.text("abc/._-=é ", min_size=1, max_size=8)


@given(path, st.dictionaries(st.sampled_from(["detect", "kind", "net"]), word), number, number)
def test_what_is_joined_is_split_again(path, words, scale, end):
    text = path + "".join(f",{k}={v}" for k, v in words.items()) + f",scale={scale},end={end}"
    assert parse_condition(text) == ConditionFlag(path, **words, scale=scale, end=end)


def test_commas_and_equal_signs_in_paths_survive():
    assert parse_condition("a,b=c/x,1.png").path == "a,b=c/x,1.png"
    assert parse_condition("a,scale=2,odd=1.png,scale=3") == ConditionFlag("a,scale=2,odd=1.png", scale=3.0)


@pytest.mark.parametrize("text, reason", [
    ("", "no path"), (",scale=1", "no path"), ("a,scale=x", "expected a number"), ("a,scale=nan", "finite"),
    ("a,scale=inf", "finite"), ("a,start=0.8,end=0.2", "start"), ("a,end=1.5", "end"), ("a,scale=1,scale=2", "twice"),
    ("a,kind=", "no value"),
])  # fmt: skip
def test_mistakes(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_condition(text)


def test_a_mistyped_key_after_a_real_file_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(UsageError, match="unknown key 'scal'") as caught:
        parse_condition(f"{tmp_path}/a.png,scal=2")
    assert caught.value.hint == "scale=..."


def test_every_kind_of_the_tables_is_known_by_name():
    """A ControlNet's or detector's kind has a row of its own, is told by a map's name, and lines stay lines."""
    from controlnet.model.registry import NETS
    from controlnet.preprocessors.detectors.registry import DETECTORS
    from controlnet.preprocessors.kinds import KINDS, kind_named
    from controlnet.preprocessors.metadata import kind_of

    assert {kind for net in NETS.values() for kind in net.kinds} | set(DETECTORS) <= set(KINDS)
    assert all(kind_of(f"photo.{name}.png", {}) == name for name in KINDS)
    assert kind_named("lineart_anime").is_lines and not kind_named("tile").is_lines
    assert kind_named("mosaic").form == "picture" and kind_named("mosaic").score is None


def test_a_second_row_of_a_kind_is_refused():
    from controlnet.preprocessors.kinds import Kind, _table

    with pytest.raises(ValueError, match="two rows"):
        _table(Kind("canny"), Kind("canny"))
