"""The table that `print(plan)` shows."""

from plan_data import PLAN


def test_the_table_says_every_rank_reason_and_the_total():
    text = str(PLAN)
    rows = {line.split()[0]: line for line in text.splitlines() if line and not line.startswith("─")}
    for layer in PLAN:
        assert layer.reason in rows[layer.name]
        assert f"{layer.out_features}×{layer.in_features}" in rows[layer.name]
    assert " 16 " in rows["encoder.0.query"]
    assert " 50%  0.2500 " in rows["encoder.0.query"]  # 16 · (64 + 64) of 64 · 64
    assert " dense " in rows["encoder.0.value"]
    # 16 · 128 + 64 · 64 + 24 · 192 parameters of 64 · 64 + 64 · 64 + 64 · 128; the head does not count.
    assert text.endswith(
        "BertModel, rank={'*.query': 16}: 2 of 4 linear layers factorized; "
        "10,752 of 16,384 targeted parameters remain (65.6%)."
    )
