"""A run on the user's own data: what the policy reads is what the columns, the template and the system message say."""

import json

from apportion.record import Run
from apportion.tasks import from_data
from apportion.train import run


def test_a_run_reads_the_prompts_of_the_file(config, tmp_path):
    rows = [{"q": f"{n}+1?", "a": n + 1} for n in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = from_data(str(tmp_path / "sums.jsonl"), prompt="q", answer="a", system="Hi.", template="{q} Go.")
    run(config(task=task, steps=1))
    rollouts = Run(tmp_path / "run").rollouts(1)
    for question, pieces in zip(rollouts.meta["question"], rollouts.meta["pieces"], strict=True):
        prompt = (
            f"<|im_start|>system\nHi.<|im_end|>\n<|im_start|>user\n{question} Go.<|im_end|>\n<|im_start|>assistant\n"
        )
        assert "".join(pieces).startswith(prompt)
        assert question in {row["q"] for row in rows}
