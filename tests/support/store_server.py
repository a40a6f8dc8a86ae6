"""An S3 server on this machine, for tests: moto's, with one bucket a test."""

import contextlib
import json
import socket
from collections.abc import Iterator

import boto3
from moto import settings
from moto.server import ThreadedMotoServer


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "only-for-tests",
    "AWS_REGION": "us-east-1",
}


class Store:
    """The server. `environment`: what a process needs to reach it."""

    def __init__(self, address: str, port: int) -> None:
        self.url = f"http://{address}:{port}"
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": self.url}
        self.buckets = 0

    @property
    def client(self):
        names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        keys = {name: CREDENTIALS[key] for name, key in names.items()}
        return boto3.client("s3", endpoint_url=self.url, region_name=CREDENTIALS["AWS_REGION"], **keys)

    def bucket(self) -> str:
        """The name of a new bucket."""
        self.buckets += 1
        name = f"bucket-{self.buckets}"
        self.client.create_bucket(Bucket=name)
        return name

    def names(self, bucket: str) -> list[str]:
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=bucket).get("Contents", [])]

    def forbid(self, bucket: str, *actions: str) -> None:
        """Refuse requests from now on, for example `s3:PutObject`; none: allow all again."""
        if not actions:
            self.client.delete_bucket_policy(Bucket=bucket)
            return
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": list(actions),
            "Resource": f"arn:aws:s3:::{bucket}/*",
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.client.put_bucket_policy(Bucket=bucket, Policy=policy)

    @contextlib.contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """Whoever is not known is refused; nobody is known."""
        allowed, settings.INITIAL_NO_AUTH_ACTION_COUNT = settings.INITIAL_NO_AUTH_ACTION_COUNT, 0.0
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = allowed


@contextlib.contextmanager
def store_server(address: str = "127.0.0.1") -> Iterator[Store]:
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer(address, port, verbose=False)
    server.start()
    try:
        yield Store(address, port)
    finally:
        server.stop()
