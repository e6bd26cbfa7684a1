"""A Hub on this machine: repositories as a cache holds them, and a server that serves them."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import shutil
import threading
import urllib.parse

import tokenizers

def write_model(folder: pathlib.Path, golden: pathlib.Path) -> pathlib.Path:
  """A tiny Llama with random weights and a byte-level tokenizer; returns the folder."""
  folder.mkdir(parents=True)
  for name in ("config.json", "model.safetensors"):
    shutil.copy(golden / name, folder)
  vocab = {piece: i for i, piece in enumerate(
      ["<s>", "</s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
  return folder


def add_to_cache(cache: pathlib.Path, repo: str, commit: str, folder: pathlib.Path,
                 revision: str | None = "main") -> pathlib.Path:
  """Puts a folder's files where a download of that commit leaves them; returns the snapshot."""
  root = cache / f"models--{repo.replace('/', '--')}"
  snapshot = root / "snapshots" / commit
  for file in sorted(path for path in folder.rglob("*") if path.is_file()):
    blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, blob)
    link = snapshot / file.relative_to(folder)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
  if revision:
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
  return snapshot


class Server:
  """Serves the repositories that are put into it.

  Attributes:
    repos: name to its commits, newest last: (commit, folder).
    gated: repositories whose files are refused.
    requests: "GET /path" of each request, in order.
  """

  def __init__(self):
    self.repos: dict[str, list[tuple[str, pathlib.Path]]] = {}
    self.gated: set[str] = set()
    self.requests: list[str] = []

  def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    parts = urllib.parse.unquote(urllib.parse.urlsplit(path).path).strip("/").split("/")
    is_api = parts[:2] == ["api", "models"]
    parts = parts[2:] if is_api else parts
    repo, (verb, revision), rest = "/".join(parts[:2]), (parts[2:4] + ["", ""])[:2], parts[4:]
    commits = self.repos.get(repo)
    if commits is None:
      return 401, {"X-Error-Code": "RepoNotFound"}, b""
    commit, folder = next(((c, f) for c, f in reversed(commits) if revision in ("main", c)), (None, None))
    if commit is None:
      return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    if is_api and verb == "revision":
      body = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
    elif is_api and verb == "tree":
      body = [{"type": "file", "path": name, "size": (folder / name).stat().st_size,
               "oid": _oid(folder / name)}
              for name in names]
    elif repo in self.gated:
      return 403, {"X-Error-Code": "GatedRepo"}, b""
    elif "/".join(rest) in names:
      file = folder / "/".join(rest)
      return 200, {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit}, file.read_bytes()
    else:
      return 404, {"X-Error-Code": "EntryNotFound"}, b""
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def _oid(file: pathlib.Path) -> str:
  data = file.read_bytes()
  return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve():
  """A running `Server` and its address."""
  server = Server()

  class Handler(http.server.BaseHTTPRequestHandler):

    def do_GET(self):
      server.requests.append(f"{self.command} {self.path}")
      status, headers, body = server.answer(self.path)
      self.send_response(status)
      for name, value in (headers | {"Content-Length": str(len(body))}).items():
        self.send_header(name, value)
      self.end_headers()
      if self.command == "GET":
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()
    thread.join()
