"""Fixtures for every test: a tiny sharded dataset; S3 on loopback, as a quick mock (moto) and as a real server (Swift)."""

import functools
import logging
import uuid

import boto3
import hypothesis
import pytest
from moto.server import ThreadedMotoServer

from infra.local.s3 import serving

# A busy machine must not fail a property: hypothesis would otherwise count 200 ms for one example as a failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """60 training and 23 test images in three classes, sharded by the real stages."""
    from training_kit import make_shards, write_images  # here: most tests need no torch

    folder = tmp_path_factory.mktemp("tiny")
    write_images(folder / "images")
    return make_shards(folder, folder / "images")


@pytest.fixture(scope="session")
def s3_server():
    """moto's server on a free loopback port; its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_endpoint(s3_server, monkeypatch):
    """The server, with AWS's standard environment pointing at it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return s3_server


@pytest.fixture
def s3_bucket(s3_endpoint):
    """The name of a fresh, empty bucket."""
    return _new_bucket(s3_endpoint)


@pytest.fixture(scope="session")
def swift_server(tmp_path_factory):
    """A real S3 server (infra.local.s3) that all tests share: those that kill one start their own."""
    with serving(tmp_path_factory.mktemp("swift")) as server:
        yield server


@pytest.fixture
def swift_endpoint(swift_server, monkeypatch):
    """The real server, with AWS's standard environment pointing at it."""
    for name, value in swift_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return swift_server.endpoint


@pytest.fixture
def swift_bucket(swift_endpoint):
    """The name of a fresh, empty bucket on the real server."""
    return _new_bucket(swift_endpoint)


@functools.cache
def _client(endpoint):
    return boto3.session.Session().client("s3", endpoint_url=endpoint)


def _new_bucket(endpoint):
    name = f"bucket-{uuid.uuid4().hex}"
    _client(endpoint).create_bucket(Bucket=name)
    return name
