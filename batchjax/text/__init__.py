"""Text to token ids and back: tokenizers, chat templates, streaming, stop strings."""

from batchjax.text.chat import compile_template, render
from batchjax.text.detokenizer import Detokenizer
from batchjax.text.stop import build_stop_table, cut
from batchjax.text.tokenizer import Tokenizer, load_tokenizer
