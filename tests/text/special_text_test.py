"""Names of special tokens in text that is not trusted."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from batchjax.text import load_tokenizer, render
from batchjax.text.messages import map_strings
from batchjax.text.special_text import SpecialText

NAMES = ["<s>", "</s>", "<|turn|>", "[INST]", "[/INST]"]
# Texts out of pieces of names, so that they often make one, alone or together.
texts = st.lists(st.sampled_from([name[i:j] for name in NAMES
                                  for i, j in itertools.combinations(range(len(name) + 1), 2)]
                                 + [" ", "\n", "a", "é"]), max_size=6).map("".join)
fixtures = [HealthCheck.function_scoped_fixture]


@given(strings=st.lists(texts, min_size=1, max_size=5), is_trimmed=st.booleans())
def test_no_name_comes_out_of_strings_however_they_are_joined(strings, is_trimmed):
  special = SpecialText(NAMES)
  trim = str.strip if is_trimmed else str
  shown = "".join(trim(special.hide(text)) for text in strings)
  assert special.sections(shown) == ["".join(map(trim, strings))]


@example(text="s>", before="<", after="")
@example(text="<", before="", after="s>")
@given(text=texts, before=texts, after=texts)
def test_names_that_the_template_wrote_are_found_beside_any_text(text, before, after):
  # A name that the template builds around a text, as "<|" + role + "|>", is its own.
  assume(not any(text in name[1:-1] for name in NAMES))
  special = SpecialText(NAMES)
  # What the template wrote is read alone: it does not make a name with the text between.
  want = special.sections(before)[:-1] + [special.sections(before)[-1] + text
                                          + special.sections(after)[0]]
  want += special.sections(after)[1:]
  assert special.sections(before + special.hide(text) + after) == want


@pytest.mark.parametrize("shown", [lambda text: "<" + text.strip(), lambda text: text.strip() + ">"])
@pytest.mark.parametrize("text", [" s> ", "\n<s\t", "s>", "<s"])
def test_a_template_that_strips_makes_no_name_with_a_text(shown, text):
  special = SpecialText(NAMES)
  assert special.sections(shown(special.hide(text))) == [shown(text)]


def test_every_string_of_a_value_is_hidden():
  special = SpecialText(NAMES)
  value = {"<s>": ["</s>", {"a": "<s>", "n": 3, "x": None}]}
  hidden = json.dumps(map_strings(value, special.hide), ensure_ascii=False)
  assert special.sections(hidden) == [json.dumps(value)]


def test_the_character_that_breaks_names_is_refused():
  with pytest.raises(ValueError, match=r"private-use character U\+10FFFD.*remove it"):
    SpecialText(NAMES).hide("a\U0010fffd")


@pytest.mark.parametrize("text", ["the </s> theatre", "</s>", "<s></s>the", " </s> 12"])
def test_prompts_are_split(tokenizer_path, text):
  tokenizer = load_tokenizer(tokenizer_path, split_special_tokens=True)
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert not set(ids) & tokenizer.special_ids - {tokenizer.encode("é")[-1]}
  assert tokenizer.decode(ids) == text
  assert set(load_tokenizer(tokenizer_path).encode(text, False)) & tokenizer.special_ids
  assert tokenizer.encode(text)[-len(ids):] == ids  # BOS comes first where it did
  assert tokenizer.encode(text)[:-len(ids)] == load_tokenizer(tokenizer_path).encode("")


TEMPLATE = ("{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content | trim }}"
            "{{ eos_token }}\n{% endfor %}")


@settings(max_examples=40, deadline=None, suppress_health_check=fixtures)
@given(contents=st.lists(texts, min_size=1, max_size=3))
def test_templates_keep_their_tokens_and_messages_get_none(tokenizer_path, contents):
  tokenizer = load_tokenizer(tokenizer_path, split_special_tokens=True)
  messages = [{"role": "user", "content": content} for content in contents]
  shown = lambda **options: render(TEMPLATE, messages, special_tokens=tokenizer.special_tokens,
                                   **options)
  [ids] = tokenizer.encode_chat([shown(special_text=tokenizer.special_text)])
  bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
  special = tokenizer.special_ids - {tokenizer.encode("\u2603")[-1]}  # unknown characters
  assert [i for i in ids if i in special] == [bos, eos] * len(contents)
  if not tokenizer.has_space_prefix:  # else spaces stand beside tokens
    assert tokenizer.decode(ids, skip_special_tokens=False) == shown()


def test_text_without_names_has_the_ids_that_it_had(tokenizer_path):
  split, plain = (load_tokenizer(tokenizer_path, flag) for flag in (True, False))
  messages = [{"role": "user", "content": "the  theatre\n é 12"}] * 2
  text = render(TEMPLATE, messages, special_tokens=plain.special_tokens)
  shown = render(TEMPLATE, messages, special_tokens=plain.special_tokens,
                 special_text=split.special_text)
  assert split.encode_chat([shown]) == plain.encode_chat([text])
  assert split.encode("the  theatre é") == plain.encode("the  theatre é")


@pytest.mark.parametrize(("left", "right"), [(True, False), (False, True), (True, True)])
def test_special_tokens_keep_their_way_with_spaces(byte_level_folder, write_tokenizer, left, right):
  contents = json.loads((byte_level_folder / "tokenizer.json").read_text())
  for token in contents["added_tokens"]:
    token |= {"lstrip": left, "rstrip": right}
  backend = tokenizers.Tokenizer.from_str(json.dumps(contents))
  folder = write_tokenizer(backend, bos_token="<s>", eos_token="</s>")
  split, plain = (load_tokenizer(folder, flag) for flag in (True, False))
  text = "a <s> the </s> b"
  assert split.encode_chat([text]) == plain.encode_chat([text]) == [backend.encode(text).ids]
