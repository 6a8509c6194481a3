"""Which options mean the same to obstore, and which are left to s3fs."""

from __future__ import annotations

from datetime import timedelta

import pytest

from asyncckpt.s3_settings import REQUEST_S, UntranslatableError, translate

CONFIG = {  # as aiobotocore's client has it when nothing was chosen
    "region_name": "us-east-1",
    "signature_version": "s3v4",
    "connect_timeout": 5,
    "read_timeout": 15,
    "retries": {"mode": "legacy"},
    "s3": None,
    "connector_args": {"keepalive_timeout": 12},
    "http_session_cls": "AIOHTTPSession",
    "proxies": None,
    "max_pool_connections": 64,
}


def settings(options=None, *, environ=None, endpoint="http://h:1", verify=True, bucket="b1b", region="r-1", **config):
    return translate(
        options or {},
        CONFIG | config,
        bucket=bucket,
        endpoint=endpoint,
        region=region,
        verify=verify,
        retry_s=9.0,
        environ=environ or {},
    )


@pytest.mark.parametrize(
    ("endpoint", "bucket", "style", "expected"),
    [
        ("http://h:1", "b1b", None, ("http://h:1", False)),
        ("http://h:1/", "b1b", "path", ("http://h:1", False)),
        ("https://h", "b1b", "virtual", ("https://b1b.h", True)),
        ("https://h", "b.b", "virtual", ("https://h", False)),
        ("https://s3.amazonaws.com", "b1b", None, ("https://b1b.s3.r-1.amazonaws.com", True)),
        ("https://s3.eu-west-1.amazonaws.com", "b1b", "auto", ("https://b1b.s3.r-1.amazonaws.com", True)),
        ("https://s3.eu-west-1.amazonaws.com", "b1b", "path", ("https://s3.r-1.amazonaws.com", False)),
        ("https://s3.eu-west-1.amazonaws.com", "b.b", None, ("https://s3.r-1.amazonaws.com", False)),
    ],
)
def test_the_endpoint_is_the_one_that_botocore_would_use(endpoint, bucket, style, expected):
    """Its own region's on AWS, with the bucket's name in the host where that is possible."""
    found = settings(endpoint=endpoint, bucket=bucket, s3={"addressing_style": style} if style else None)
    assert (found["endpoint"], found["virtual_hosted_style_request"]) == expected
    assert found["aws_endpoint_url_s3"] == found["endpoint"]


@pytest.mark.parametrize(
    ("endpoint", "signing", "unsigned"),
    [("http://h", None, False), ("https://h", None, True), ("http://h", False, True), ("https://h", True, False)],
)
def test_the_body_is_signed_where_botocore_signs_it(endpoint, signing, unsigned):
    """By default over http alone."""
    s3 = {} if signing is None else {"payload_signing_enabled": signing}
    assert settings(endpoint=endpoint, s3=s3)["unsigned_payload"] is unsigned


def test_times_are_translated_and_tries_are_ours():
    """How often botocore would try does not count."""
    found = settings(connect_timeout=3, read_timeout=60, retries={"total_max_attempts": 2})
    assert found["client_options"]["connect_timeout"] == timedelta(seconds=3)
    assert found["client_options"]["timeout"] == timedelta(seconds=60 + REQUEST_S)
    assert found["retry_config"]["retry_timeout"] == timedelta(seconds=9)
    assert found["retry_config"]["max_retries"] > 100


def test_an_anonymous_client_does_not_sign():
    """Nor does another protocol than http or https get allowed."""
    found = settings(signature_version="unsigned", endpoint="https://h", verify=False)
    assert found["skip_signature"] is True
    assert found["client_options"]["allow_http"] is False
    assert found["client_options"]["allow_invalid_certificates"] is True


def test_options_that_are_not_about_bytes_change_nothing():
    """And those that s3fs resolved into its client."""
    options = {
        "key": "k",
        "secret": "s",
        "token": "t",
        "anon": False,
        "client_kwargs": {"endpoint_url": "http://h:1", "region_name": "r-1"},
        "config_kwargs": {"read_timeout": 3},
        "default_block_size": 1 << 20,
        "use_listings_cache": False,
        "skip_instance_cache": True,
        "requester_pays": False,
        "s3_additional_kwargs": {},
    }
    assert settings(options) == settings()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": {"requester_pays": True}}, "no requester_pays"),
        ({"options": {"s3_additional_kwargs": {"ACL": "private"}}}, "no s3_additional_kwargs"),
        ({"options": {"version_aware": True}}, "no version_aware"),
        ({"options": {"unheard_of": 1}}, "no unheard_of"),
        ({"options": {"client_kwargs": {"api_version": "2006"}}}, "no api_version in client_kwargs"),
        ({"proxies": {"http": "http://p"}}, "no proxies in config_kwargs"),
        ({"use_dualstack_endpoint": True}, "no use_dualstack_endpoint"),
        ({"connector_args": {"ssl_context": 1}}, "no connector_args"),
        ({"s3": {"use_accelerate_endpoint": True}}, "no use_accelerate_endpoint"),
        ({"s3": {"addressing_style": "odd"}}, "addressing_style 'odd'"),
        ({"signature_version": "s3"}, "sign as s3"),
        ({"environ": {"AWS_SERVER_SIDE_ENCRYPTION": "aws:kms"}}, "AWS_SERVER_SIDE_ENCRYPTION is in the environment"),
        ({"endpoint": "https://h", "verify": "/ca.pem"}, "verify names certificates"),
        ({"endpoint": "http://h/path"}, "not tried"),
        ({"endpoint": "https://s3.cn-north-1.amazonaws.com.cn"}, "not tried"),
        ({"bucket": "arn:aws:s3:eu-west-1:1:accesspoint/a"}, "not an ordinary bucket"),
        ({"bucket": "b--x-s3"}, "not an ordinary bucket"),
    ],
)
def test_what_is_not_known_to_mean_the_same_is_refused(change, reason):
    """With the reason in words."""
    with pytest.raises(UntranslatableError, match=reason):
        settings(**change)
