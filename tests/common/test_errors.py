"""What the machine's own errors become for a person."""

from train.common.errors import explain


def test_a_process_whose_peer_has_left_says_so_in_one_sentence() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31")
    assert "another process of this run has ended" in (explain(gloo, "train") or "")
    assert explain(RuntimeError("shapes differ"), "train") is None
