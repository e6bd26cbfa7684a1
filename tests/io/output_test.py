"""The objects of the output and error files, in each form."""

import numpy as np
import pytest

from batchjax.io import output
from batchjax.io.records import RowError
from batchjax.io.store import StoredRow
from batchjax.types import Choice, Completion, Request, SamplingParams

# Each token's bytes; 4 and 5 are the halves of "é"; 10 and 11 are special tokens.
VOCAB = [b"<s>", b"Hi", b" th", b"ere", b"\xc3", b"\xa9", b".\n", b"END", b"xE", b"ND!", b"<a>",
         b"<b>"]


class Tokenizer:
  """What the output needs of one; ids past the vocabulary have no bytes."""

  def token_name(self, token):
    return VOCAB[token] if token < len(VOCAB) else b""

  def text_pieces(self, token_ids, echoed=()):
    return [VOCAB[t] for t in echoed] + [b"" if t in (10, 11) else VOCAB[t] for t in token_ids]


def stored(form, prompt=(0, 1), echo=False, return_token_ids=False, **params):
  return StoredRow(0, 1, form, "m", echo, return_token_ids, Request(
      "r1", np.array(prompt, np.int32), SamplingParams(**params)))


def choice(token_ids, finish_reason="length", index=0, logprobs=None, top=None):
  kwargs = {}
  if logprobs is not None:
    kwargs["logprobs"] = np.array(logprobs, np.float32)
  if top is not None:
    kwargs["top_token_ids"] = np.array([[t for t, _ in row] for row in top], np.int32)
    kwargs["top_logprobs"] = np.array([[p for _, p in row] for row in top], np.float32)
  return Choice(index, np.array(token_ids, np.int32), finish_reason, **kwargs)


def format_row(row, *choices, **kwargs):
  completion = Completion("r1", choices, len(row.request.prompt_token_ids), 1, **kwargs)
  return output.format_completion(row, completion, tokenizer=Tokenizer(), job_id="job")


def test_chat():
  row = stored("chat", n=2)
  got = format_row(row, choice([2, 3]), choice([1], "stop", index=1))
  body = got["response"]["body"]
  digest = body["id"].removeprefix("chatcmpl-")
  assert len(digest) == 24
  assert got == {
      "id": f"batch_req_{digest}", "custom_id": "r1", "error": None,
      "response": {"status_code": 200, "request_id": f"req_{digest}", "body": {
          "id": f"chatcmpl-{digest}", "object": "chat.completion", "created": 0, "model": "m",
          "choices": [
              {"index": 0, "message": {"role": "assistant", "content": " there"},
               "finish_reason": "length", "logprobs": None},
              {"index": 1, "message": {"role": "assistant", "content": "Hi"},
               "finish_reason": "stop", "logprobs": None}],
          "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5,
                    "prompt_tokens_details": {"cached_tokens": 1}}}}}


def test_chat_logprobs():
  row = stored("chat", logprobs=True, top_logprobs=2)
  got = format_row(row, choice([1, 4], logprobs=[-0.1, -np.inf],
                               top=[[(1, -0.1), (2, -3)], [(5, -0.5), (4, -np.inf)]]))
  assert got["response"]["body"]["choices"][0]["logprobs"] == {"content": [
      {"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": [
          {"token": "Hi", "logprob": -0.1, "bytes": [72, 105]},
          {"token": " th", "logprob": -3.0, "bytes": [32, 116, 104]}]},
      {"token": "\\xc3", "logprob": -9999.0, "bytes": [195], "top_logprobs": [
          {"token": "\\xa9", "logprob": -0.5, "bytes": [169]},
          {"token": "\\xc3", "logprob": -9999.0, "bytes": [195]}]}]}


def test_completions_logprobs_with_echo():
  row = stored("completions", prompt=(1, 4), echo=True, logprobs=True, top_logprobs=1,
               prompt_logprobs=True)
  got = format_row(
      row, choice([5, 2], logprobs=[-1, -2], top=[[(5, -1)], [(3, -0.25)]]),
      prompt_logprobs=np.array([np.nan, -4], np.float32),
      prompt_top_token_ids=np.array([[9], [2]], np.int32),
      prompt_top_logprobs=np.array([[np.nan], [-0.5]], np.float32))
  [got] = got["response"]["body"]["choices"]
  assert got["logprobs"] == {
      "tokens": ["Hi", "\\xc3", "\\xa9", " th"],
      "token_logprobs": [None, -4.0, -1.0, -2.0],
      "top_logprobs": [None, {" th": -0.5, "\\xc3": -4.0}, {"\\xa9": -1.0},
                       {"ere": -0.25, " th": -2.0}],
      "text_offset": [0, 2, 2, 3]}
  assert got["text"] == "Hié th"  # a character may begin in the prompt and end in the sample


def test_completions_without_alternatives():
  [got] = format_row(stored("completions", logprobs=True),
                     choice([2, 3], logprobs=[-1, -2]))["response"]["body"]["choices"]
  assert got["text"] == " there"
  assert got["logprobs"] == {"tokens": [" th", "ere"], "token_logprobs": [-1.0, -2.0],
                             "top_logprobs": None, "text_offset": [0, 3]}


def test_offsets_stay_within_text_that_a_stop_string_cut():
  row = stored("completions", logprobs=True, stop=("END",))
  got = format_row(row, choice([1, 8, 9], "stop", logprobs=[-1, -1, -1]))
  [got] = got["response"]["body"]["choices"]
  assert (got["text"], got["logprobs"]["text_offset"]) == ("Hix", [0, 2, 3])


def test_plain():
  usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3,
           "prompt_tokens_details": {"cached_tokens": 1}}
  assert format_row(stored("plain"), choice([1])) == {
      "id": "r1", "text": "Hi", "finish_reason": "length", "usage": usage}
  assert format_row(stored("plain", echo=True, return_token_ids=True), choice([1])) == {
      "id": "r1", "text": "<s>HiHi", "finish_reason": "length", "token_ids": [1], "usage": usage}


def test_plain_with_samples_and_logprobs():
  row = stored("plain", n=2, logprobs=True, top_logprobs=1, prompt_logprobs=True)
  one = [[(1, -0.5)]]
  got = format_row(row, choice([1], logprobs=[-0.5], top=one),
                   choice([2], "stop", 1, logprobs=[-1.5], top=one),
                   prompt_logprobs=np.array([np.nan, -2], np.float32),
                   prompt_top_token_ids=np.array([[0], [3]], np.int32),
                   prompt_top_logprobs=np.array([[np.nan], [-1]], np.float32))
  top = [{"token_id": 1, "token": "Hi", "logprob": -0.5}]
  assert got["choices"] == [
      {"index": 0, "text": "Hi", "finish_reason": "length", "logprobs": [
          {"token_id": 1, "token": "Hi", "logprob": -0.5, "top_logprobs": top}]},
      {"index": 1, "text": " th", "finish_reason": "stop", "logprobs": [
          {"token_id": 2, "token": " th", "logprob": -1.5, "top_logprobs": top}]}]
  assert got["prompt_logprobs"] == [
      {"token_id": 0, "token": "<s>", "logprob": None},
      {"token_id": 1, "token": "Hi", "logprob": -2.0, "top_logprobs": [
          {"token_id": 3, "token": "ere", "logprob": -1.0}]}]
  assert "text" not in got


@pytest.mark.parametrize("token_ids, finish_reason, stop, text", [
    ([1, 7], "stop", ("END",), "Hi"),
    ([1, 8, 9], "stop", ("END",), "Hix"),         # begins inside one token, ends inside another
    ([1, 8, 9], "stop", ("D!", "END"), "Hix"),    # the earlier of two
    ([1, 8, 9], "stop", ("Hi", "END"), "Hix"),    # "Hi" stood before the last token: not the cause
    ([1, 8, 9], "length", ("END",), "HixEND!"),   # not the cause at all
    ([1, 2], "stop", ("END",), "Hi th"),          # an end token was
    ([1, 4, 5], "stop", ("é",), "Hi"),            # the character is whole with the last token
    ([7], "stop", ("END",), ""),
    ([], "stop", ("END",), ""),
    ([1, 7], "stop", ("END", "N"), "HiE"),        # "N" was complete first
    ([2, 3], "stop", ("there", "e"), " th"),      # so was the first "e"
])
def test_stop_strings(token_ids, finish_reason, stop, text):
  pieces = Tokenizer().text_pieces(token_ids)
  assert output.choice_text(choice(token_ids, finish_reason), stop, pieces) == text


@pytest.mark.parametrize("token_ids, text", [([9], "HixEND!"), ([1, 8, 9], "HixEHix")])
def test_a_stop_string_does_not_begin_in_the_echoed_prompt(token_ids, text):
  pieces = Tokenizer().text_pieces(token_ids, echoed=[1, 8])
  assert output.choice_text(choice(token_ids, "stop"), ("END",), pieces) == text


@pytest.mark.parametrize("top", [None, 2])
def test_a_prompt_of_which_nothing_follows_keeps_its_scores(top):
  """An end token at once, or `max_tokens` 0: an empty list is not the same as none."""
  row = stored("completions", prompt=(10, 1), echo=True, logprobs=True, prompt_logprobs=True,
               top_logprobs=top or 0)
  tops = {} if top is None else {
      "prompt_top_token_ids": np.array([[0, 0], [11, 10]], np.int32),
      "prompt_top_logprobs": np.array([[np.nan, np.nan], [-0.5, -2]], np.float32)}
  [got] = format_row(row, choice([], "stop", logprobs=[]),
                     prompt_logprobs=np.array([np.nan, -4], np.float32),
                     **tops)["response"]["body"]["choices"]
  assert got["text"] == "<a>Hi"
  assert got["logprobs"] == {
      "tokens": ["<a>", "Hi"], "token_logprobs": [None, -4.0], "text_offset": [0, 3],
      "top_logprobs": None if top is None else [None, {"<b>": -0.5, "<a>": -2.0, "Hi": -4.0}]}


def test_alternatives_that_were_asked_for_are_a_list_even_where_there_are_none():
  row = stored("completions", logprobs=True, top_logprobs=2)
  [got] = format_row(row, choice([], "stop", logprobs=[]))["response"]["body"]["choices"]
  assert got["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [],
                             "text_offset": []}


def test_special_tokens_have_their_names_and_ids_outside_the_vocabulary_numbers():
  top = [[(10, -0.5), (11, -1), (12, -2), (13, -3)]]
  sample = choice([10], logprobs=[-0.5], top=top)
  params = dict(logprobs=True, top_logprobs=4)
  names = ["<a>", "<b>", "token_id:12", "token_id:13"]
  [got] = format_row(stored("completions", **params), sample)["response"]["body"]["choices"]
  assert got["text"] == "" and got["logprobs"]["tokens"] == ["<a>"]
  assert got["logprobs"]["top_logprobs"] == [dict(zip(names, [-0.5, -1.0, -2.0, -3.0]))]
  assert got["logprobs"]["text_offset"] == [0]
  [got] = format_row(stored("chat", **params), sample)["response"]["body"]["choices"]
  content, = got["logprobs"]["content"]
  assert (content["token"], content["bytes"]) == ("<a>", [60, 97, 62])
  assert [entry["token"] for entry in content["top_logprobs"]] == names
  assert [entry["bytes"] for entry in content["top_logprobs"]][2:] == [[], []]
  [got] = format_row(stored("plain", **params), sample)["logprobs"]
  assert [got["token"], *(entry["token"] for entry in got["top_logprobs"])] == ["<a>", *names]


def test_offsets_pass_over_special_tokens_that_were_generated():
  [got] = format_row(stored("completions", logprobs=True),
                     choice([1, 10, 2], logprobs=[-1, -1, -1]))["response"]["body"]["choices"]
  assert (got["text"], got["logprobs"]["text_offset"]) == ("Hi th", [0, 2, 2])


def test_ids_depend_on_job_and_request_alone():
  row = stored("chat")
  first, again = (format_row(row, choice([1])) for _ in range(2))
  assert first == again
  other = output.format_completion(row, Completion("r1", (choice([1]),), 2, 0),
                                   tokenizer=Tokenizer(), job_id="other")
  assert other["id"] != first["id"]


def test_nan_is_not_written():
  with pytest.raises(ValueError, match="log-probability is NaN"):
    format_row(stored("plain", logprobs=True), choice([1], logprobs=[np.nan]))


@pytest.mark.parametrize("reasons, is_error", [(["stop", "length"], False), (["stop", "error"], True)])
def test_a_request_with_a_sample_that_failed_is_an_error(reasons, is_error):
  row = stored("chat", n=2)
  choices = tuple(choice([1], reason, index) for index, reason in enumerate(reasons))
  error = output.completion_error(row, Completion("r1", choices, 2, 0))
  assert (error is not None) == is_error
  if error:
    assert (error.index, error.row, error.request_id, error.code) == (0, 1, "r1", "model_error")
    assert "NaN or infinite: check its weights" in error.message
    assert output.format_error(error, job_id="j")["response"]["status_code"] == 500


def test_error():
  error = RowError(4, 6, "c", "n", "n must be an integer of at least 1, got 0", "invalid_value")
  got = output.format_error(error, job_id="job")
  details = {"code": "invalid_value", "message": error.message, "param": "n", "row": 6}
  assert got == {"id": got["id"], "custom_id": "c", "error": details,
                 "response": {"status_code": 400, "request_id": got["response"]["request_id"],
                              "body": {"error": details}}}
  unread = output.format_error(RowError(0, 1, None, "", "bad", "invalid_json"), job_id="job")
  assert (unread["custom_id"], unread["error"]["param"]) == (None, None)
  assert unread["id"] != got["id"]
