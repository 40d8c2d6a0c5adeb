import os
import socket

import pytest


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, ("192.0.2.1", 443)),  # addresses reserved for documentation: nobody is there
        (socket.AF_INET, ("huggingface.co", 443)),
        (socket.AF_INET6, ("2001:db8::1", 443, 0, 0)),
    ],
)
def test_connecting_to_another_machine_fails_the_test(method: str, family: int, address: tuple) -> None:
    with socket.socket(family) as sock, pytest.raises(pytest.fail.Exception, match="tried to reach the network"):
        getattr(sock, method)(address)


def test_a_library_that_swallows_errors_cannot_hide_the_attempt() -> None:
    def swallow() -> None:
        try:
            socket.create_connection(("192.0.2.1", 80), timeout=1)
        except Exception:
            pass

    with pytest.raises(pytest.fail.Exception):
        swallow()


def test_connecting_to_this_machine_is_allowed() -> None:
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        client.connect(server.getsockname())


def test_the_hubs_are_switched_off_before_they_are_imported() -> None:
    import datasets
    import huggingface_hub

    assert huggingface_hub.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["OMP_NUM_THREADS"] == "1"
