"""Hints only after a failure, as in GHPO (arXiv 2507.10628): groups without a right answer are sampled again.

1/4 of the solution is shown, then 1/2, then 3/4. The hint's likelihood is trained on, as in UFT. There are no
hints from hint_steps on.
"""

import train_uft


def retry(groups, run, data, step, cfg):
    for attempt, share in enumerate((0.25, 0.5, 0.75), 1):
        failed = [i for i, g in enumerate(groups) if all(t.reward < 1 for t in g)]
        if step >= cfg.hint_steps or not failed:
            break
        picks = [train_uft.redraw(groups[i][0].pick, attempt, cfg) for i in failed]
        segments = [data.problems[p.problem].segments for p in picks]
        shown = [[min(m, max(1, round(share * m)))] * cfg.rollouts for m in segments]
        again = train_uft.rollout(run, data, picks, shown, cfg)
        for i, group in zip(failed, again, strict=True):
            groups[i] = group
    return groups


METHOD = train_uft.METHODS["uft"]._replace(hint_length=train_uft.no_hint, after_rollout=retry)
