"""Credentials are told to nobody: not in errors or causes, logs, events, warnings, reprs, files, nor on a screen.

Each flow holds a value that stands nowhere else, and what came out of it is searched for that value. What the clients
log themselves is theirs: botocore's own DEBUG log has headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
import torch

from asyncckpt import CheckpointManager, ShardReader, ShardWriter
from asyncckpt.cli.app import app
from asyncckpt.events import Event
from asyncckpt.storage import open_storage, redact
from tests.s3 import S3Proxy
from tests.servers import S3Server

CANARY = "c4n4ry/Zx9+Qq7wLm"
FORMS = (CANARY, CANARY.replace("/", "%2F").replace("+", "%2B"), "c4n4ry")
STATE = {"w": torch.arange(4.0), "n": 3}


class Heard(logging.Handler):
    """All that came out."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(logging.Formatter().format(record) + repr(record.args))

    def sink(self, event: Event) -> None:
        self.texts.append(repr(event))
        for value in vars(event).values() if hasattr(event, "__dict__") else dataclasses.asdict(event).values():
            self.value(value)

    def value(self, value: Any) -> None:
        if isinstance(value, BaseException):
            self.error(value)
        self.texts.append(f"{value!r} {value}")

    def error(self, exc: BaseException) -> None:
        self.texts.append("".join(traceback.format_exception(exc)))
        chain: list[BaseException | None] = [exc]
        while chain:
            if (one := chain.pop()) is not None:
                self.texts.append(repr((one, one.args, getattr(one, "__notes__", ()), getattr(one, "url", ""))))
                chain += [one.__cause__, *getattr(one, "exceptions", ())]


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler, logger = Heard(), logging.getLogger("asyncckpt")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield handler
        handler.texts += map(str, warned)
    logger.removeHandler(handler)
    logger.setLevel(before)
    told = [text for text in handler.texts if any(form in text for form in FORMS)]
    assert not told, told[0]
    assert len(handler.texts) > 1


def use(heard: Heard, url: str, options: dict[str, Any] | None, **arguments: Any) -> bool:
    """Save, list, restore, verify, each where the one before went well, and say how it is called; whether all did."""

    def run(work: Callable[[], Any]) -> Any:
        try:
            value = work()
        except BaseException as exc:
            heard.error(exc)
            return None
        heard.value(value)
        return value

    def all_of_it() -> bool:
        settings = {
            "storage_options": options,
            "events": [heard.sink],
            "chkpt_on_preemption": False,
            "timeout": 5.0,
            "retry_timeout": 0.05,
        }
        with CheckpointManager(url, 1, **settings, **arguments) as manager:
            heard.value(manager)
            heard.value(manager.url)
            run(lambda: manager.prewarm(STATE))
            saved = run(lambda: manager.save(1, STATE))
            run(lambda: manager.restore(1, {"w": torch.zeros(4), "n": 0}))
            run(lambda: manager.restore_latest({"w": torch.zeros(4), "n": 0}))
            run(lambda: manager.verify(1))
            run(lambda: manager.refresh())
            run(lambda: manager.restore(77, {"w": torch.zeros(4)}))
            return bool(saved)

    def storage() -> Any:
        opened = open_storage(url, options, retry_timeout=0.05, **arguments)
        heard.value(opened)
        return [opened.client, opened.client_reason]

    run(storage)
    heard.value([ShardReader(f"{url}/1", storage_options=options), ShardWriter(f"{url}/1", storage_options=options)])
    if url.startswith(("nope", "memory")):  # the command line waits as long as a server may need to start again
        run(lambda: ShardReader(f"{url}/1", storage_options=options).read_metadata())
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
            run(lambda: app(["ls", url], standalone_mode=False))
        heard.texts.append(out.getvalue())
    return bool(run(all_of_it))


def stored(url: str, options: dict[str, Any] | None) -> bytes:
    filesystem, root = fsspec.url_to_fs(url, **(options or {}))
    return b"".join(filesystem.cat_file(path) for path in filesystem.find(root))


def test_a_run_that_works_tells_no_option(heard: Heard, memory_url: str) -> None:
    """Nor writes one into its files."""
    options = {"secret": CANARY, "client_kwargs": {"headers": {"Authorization": f"Bearer {CANARY}"}}}
    assert use(heard, memory_url, options)
    assert CANARY.encode() not in stored(memory_url, None)


@pytest.mark.slow
def test_a_run_on_s3_that_works_tells_no_key(heard: Heard, s3_url: str, s3_server: S3Server) -> None:
    """By both clients."""
    for transfer in ("auto", "fsspec"):
        token = {"client_kwargs": {"endpoint_url": s3_server.endpoint}}
        options = s3_server.storage_options | token
        assert use(heard, f"{s3_url}/{transfer}", options, transfer=transfer)
        assert s3_server.secret.encode() not in stored(f"{s3_url}/{transfer}", options)
    assert not [text for text in heard.texts if s3_server.secret in text]


@pytest.mark.parametrize("transfer", ["auto", "fsspec"])
def test_a_wrong_secret_is_not_told(heard: Heard, s3_url: str, s3_server: S3Server, transfer: str) -> None:
    """The answer is 403."""
    use(heard, s3_url, s3_server.storage_options | {"secret": CANARY}, transfer=transfer)


def test_a_missing_bucket_tells_no_secret(heard: Heard, s3_server: S3Server) -> None:
    """The answer is 404."""
    assert not use(heard, "s3://no-such-bucket-here/run", s3_server.storage_options)
    assert not [text for text in heard.texts if s3_server.secret in text]


@pytest.mark.parametrize("transfer", ["auto", "fsspec"])
def test_an_expired_token_that_the_answer_repeats_is_not_told(
    heard: Heard, s3_url: str, s3_server: S3Server, transfer: str
) -> None:
    """S3 repeats it in <Token-0>; here in its message, too."""
    with S3Proxy(s3_server.endpoint, lambda request: "token") as proxy:
        options = s3_server.storage_options | {"token": CANARY, "client_kwargs": {"endpoint_url": proxy.endpoint}}
        use(heard, s3_url, options, transfer=transfer)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (f"s3://key:{CANARY}@bucket/run", {"client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}),
        ("s3://bucket/run", {"key": "k", "secret": CANARY, "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}),
        ("s3://bucket/run", {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://u:{CANARY}@127.0.0.1:1"}}),
        ("s3://bucket/run", {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:1/?token={FORMS[1]}"}),
        ("s3://bucket/run", {"key": "k", "secret": CANARY, "endpoint_url": f"no url {CANARY}"}),
        ("s3://bucket/run", {"key": "k", "secret": CANARY, "client_kwargs": {"aws_sesion_token": CANARY}}),
        ("s3://bucket/run", {"key": CANARY, "secret": CANARY, "config_kwargs": {"secret": CANARY}}),
        ("s3://bucket/run", {"key": "k", "secret": {"a": CANARY}}),
        ("s3://bucket/run", {"key": "k", "secret": CANARY, "config_kwargs": {"proxies": {"http": f"http://u:{CANARY}@127.0.0.1:1"}},
                             "client_kwargs": {"endpoint_url": "http://h.invalid"}}),
        pytest.param("gs://bucket/run", {"token": CANARY, "endpoint_url": "http://[::1]:1"}, marks=pytest.mark.slow),
        ("gs://bucket/run", {"token": {"type": "service_account", "private_key": CANARY}, "endpoint_url": "http://127.0.0.1:1"}),
        ("gs://bucket/run", {"token": {"type": "authorized_user", "client_id": "a", "client_secret": CANARY,
                             "refresh_token": CANARY, "token_uri": "http://127.0.0.1:1"}, "endpoint_url": "http://127.0.0.1:1"}),
        (f"http://user:{FORMS[1]}@127.0.0.1:1/run", None),
        (f"http://127.0.0.1:1/run?X-Amz-Signature={FORMS[1]}&a=1", None),
        (f"http://127.0.0.1:1/run?X-Amz-Security-Token={CANARY}", None),
        ("http://127.0.0.1:1/run", {"client_kwargs": {"headers": {"Authorization": f"Bearer {CANARY}"}}}),
        (f"ftp://user:{FORMS[1]}@127.0.0.1:1/run", None),
        (f"nope://user:{CANARY}@host/run?token={CANARY}", None),
        (f"nope://user:{CANARY}@host/run", {"secret": CANARY}),
        ("memory://run", {"secret": CANARY, "skip_instance_cache": object()}),
    ],
)  # fmt: skip
def test_what_fails_to_connect_or_to_open_tells_no_secret(
    heard: Heard, url: str, options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a client says of it."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    use(heard, url, options)


def test_the_text_of_a_url_has_neither_user_nor_query_values() -> None:
    """As it stands in every message."""
    assert redact(f"s3://k:{CANARY}@b/run") == "s3://***@b/run"
    assert redact(f"see https://b/run?sig={FORMS[1]}&x=1 or s3://b") == "see https://b/run?sig=***&x=*** or s3://b"
    assert redact("s3://b/run") == "s3://b/run"
    assert json.loads(json.dumps(redact("no url: 1"))) == "no url: 1"
