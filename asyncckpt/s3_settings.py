"""What s3fs resolved for a bucket, as the arguments of obstore's `S3Store`, or why that cannot be said exactly.

Pure decisions: what came from options, environment, profiles and files was already resolved by s3fs and botocore.
What is not known here is refused, so that obstore never does something else than s3fs would. Called by s3_obstore.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from asyncckpt.retries import CAP_S, FIRST_S

# Of one request, on top of the client's own read_timeout. obstore limits the whole of it, not silence: eight parts of
# 16 MiB have to pass in it, so that 1 MiB/s is the slowest line. A guess.
REQUEST_S = 120.0
CONNECT_S = 5.0  # where the client has no limit; s3fs's own
ANY_TRIES = 1000  # the deadline decides

# Arguments of s3fs that say nothing of how bytes move, or whose effect is among the other arguments of `translate`.
_KNOWN_OPTIONS = {
    "anon", "endpoint_url", "key", "secret", "token", "username", "password", "profile", "session", "use_ssl",
    "client_kwargs", "config_kwargs", "cache_regions", "default_block_size", "default_fill_cache",
    "default_cache_type", "fixed_upload_size", "local_expiry_check", "max_concurrency", "use_listings_cache",
    "listings_expiry_time", "max_paths", "skip_instance_cache", "loop",
}  # fmt: skip
_KNOWN_CLIENT_ARGUMENTS = {
    "region_name", "endpoint_url", "use_ssl", "verify",
    "aws_access_key_id", "aws_secret_access_key", "aws_session_token",
}  # fmt: skip
# The same for botocore's Config. Any other value that is set is refused.
_KNOWN_CONFIG = {
    "region_name", "signature_version", "connect_timeout", "read_timeout", "retries", "s3",
    "user_agent", "user_agent_extra", "user_agent_appid", "parameter_validation", "inject_host_prefix",
    "max_pool_connections", "tcp_keepalive", "account_id_endpoint_mode", "disable_request_compression",
    "request_min_compression_size_bytes", "endpoint_discovery_enabled", "defaults_mode", "warm_up_loader_caches",
    "request_checksum_calculation", "response_checksum_validation", "ignore_configured_endpoint_urls",
}  # fmt: skip
_DEFAULT_CONFIG = {"connector_args": {"keepalive_timeout": 12}, "http_session_cls": "AIOHTTPSession"}  # aiobotocore's
_KNOWN_S3_CONFIG = {
    "addressing_style", "payload_signing_enabled", "us_east_1_regional_endpoint",
    # for the AWS command line
    "max_concurrent_requests", "max_queue_size", "multipart_threshold", "multipart_chunksize", "max_bandwidth",
}  # fmt: skip
# Read by obstore and by nobody else.
_OBSTORE_VARIABLES = {
    "AWS_CHECKSUM_ALGORITHM", "AWS_SERVER_SIDE_ENCRYPTION", "AWS_SSE_KMS_KEY_ID", "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64", "AWS_REQUEST_PAYER", "AWS_S3_EXPRESS", "AWS_PROXY_URL", "AWS_PROXY_EXCLUDES",
    "AWS_PROXY_CA_CERTIFICATE", "AWS_ROOT_CERTIFICATE", "AWS_DEFAULT_HEADERS", "AWS_DEFAULT_CONTENT_TYPE",
    "AWS_HTTP2_ONLY", "AWS_HTTP1_ONLY",
}  # fmt: skip
_AWS_ENDPOINT = re.compile(r"https://s3(\.[a-z0-9-]+)?\.amazonaws\.com")


class UntranslatableError(Exception):
    """The message is the reason, in words for an event."""


def is_aws(endpoint: str) -> bool:
    """Where a bucket has a region of its own, which decides the host."""
    return bool(_AWS_ENDPOINT.fullmatch(endpoint))


def translate(
    options: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    bucket: str,
    endpoint: str,
    region: str,
    verify: Any,
    retry_s: float,
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Keyword arguments of `S3Store`, without credentials. Raises UntranslatableError.

    options: of the s3fs filesystem. config: of its botocore client, all values; "unsigned" as signature_version for no
    signature. endpoint: the client's, without the bucket. region: the bucket's on AWS, else the client's. verify: of
    the client's TLS. retry_s: no try begins later than this after the first.
    """
    _check_options(options)
    _check_config(config)
    for name in sorted(_OBSTORE_VARIABLES & environ.keys()):
        raise UntranslatableError(f"{name} is in the environment, which obstore would follow and s3fs does not")
    host, is_virtual = _host(endpoint, bucket, region, config)
    is_http = host.startswith("http://")
    if not is_http and verify not in (True, None, False):
        raise UntranslatableError("verify names certificates; obstore would trust the system's as well")
    s3 = config.get("s3") or {}
    return {
        "bucket": bucket,
        "endpoint": host,
        "aws_endpoint_url_s3": host,  # else a variable of that name would win
        "region": region,
        "virtual_hosted_style_request": is_virtual,
        "skip_signature": config.get("signature_version") == "unsigned",
        # botocore's rule: over https the body is not signed
        "unsigned_payload": not s3.get("payload_signing_enabled", is_http),
        "client_options": {
            "allow_http": is_http,
            "allow_invalid_certificates": verify is False,
            "connect_timeout": timedelta(seconds=config.get("connect_timeout") or CONNECT_S),
            "timeout": timedelta(seconds=REQUEST_S + (config.get("read_timeout") or 0)),
        },
        "retry_config": {
            "max_retries": ANY_TRIES if retry_s else 0,
            "retry_timeout": timedelta(seconds=retry_s),
            "backoff": {
                "init_backoff": timedelta(seconds=FIRST_S),
                "max_backoff": timedelta(seconds=CAP_S),
                "base": 2,
            },
        },
    }


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if value and name not in _KNOWN_OPTIONS:
            raise UntranslatableError(f"obstore knows no {name}")
    for name, value in (options.get("client_kwargs") or {}).items():
        if value and name not in _KNOWN_CLIENT_ARGUMENTS:
            raise UntranslatableError(f"obstore knows no {name} in client_kwargs")


def _check_config(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if value and name not in _KNOWN_CONFIG and value != _DEFAULT_CONFIG.get(name):
            raise UntranslatableError(f"obstore knows no {name} in config_kwargs")
    for name, value in (config.get("s3") or {}).items():
        if value and name not in _KNOWN_S3_CONFIG:
            raise UntranslatableError(f"obstore knows no {name} in config_kwargs['s3']")
    if config.get("signature_version") not in ("s3v4", "unsigned"):
        raise UntranslatableError(f"obstore cannot sign as {config.get('signature_version')}")


def _host(endpoint: str, bucket: str, region: str, config: Mapping[str, Any]) -> tuple[str, bool]:
    """(endpoint for obstore, whether it holds the bucket's name), by botocore's rules."""
    style = (config.get("s3") or {}).get("addressing_style") or "auto"
    url = urlsplit(endpoint)
    if style not in ("auto", "path", "virtual"):
        raise UntranslatableError(f"addressing_style {style!r} is not known")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", bucket) or bucket.endswith("--x-s3"):
        raise UntranslatableError(f"{bucket} is not an ordinary bucket")
    if is_aws(endpoint):
        endpoint, wants_virtual = f"https://s3.{region}.amazonaws.com", style != "path"
    elif (url.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")) or url.path.strip("/") or url.query:
        raise UntranslatableError(f"an endpoint like {endpoint} was not tried with obstore")
    else:
        endpoint, wants_virtual = endpoint.rstrip("/"), style == "virtual"
    if not wants_virtual or not re.fullmatch(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]", bucket):
        return endpoint, False
    scheme, _, host = endpoint.partition("://")
    return f"{scheme}://{bucket}.{host}", True
