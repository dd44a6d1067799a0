"""A log of plans survives the disk and is planned again."""

from tandem.scheduler import policy, replay
from tandem.scheduler.policy import Limits, RunningRow, Snapshot, WaitingRow
from tandem.scheduler.training import BackwardView, ForwardView, TrainRow, TrainView, UpdateView


def records():
    rows = (TrainRow(-1, 300, 1),)
    view = TrainView(
        4, ForwardView(1, rows, 300, 0, None, 0, True, 0), BackwardView(2, rows, 300, 9, 0, True, 3, 300, False),
        (UpdateView(3, 1000, 0),),
    )  # fmt: skip
    snapshots = [
        Snapshot(train=view),
        Snapshot((RunningRow(0, 20, 19),), (), 50, 0.2, view),
        Snapshot((RunningRow(0, 20, 19),), (WaitingRow(1, 400),), 50),
    ]
    return [replay.PlanRecord(policy.plan(s, Limits()), 0.1, s, Limits()) for s in snapshots]


def test_a_log_is_read_as_it_was_written_and_planned_the_same(tmp_path, capsys):
    replay.save(records(), tmp_path / "log")
    assert replay.load(tmp_path / "log") == records()
    assert replay.differences(replay.load(tmp_path / "log")) == []
    assert replay.main(str(tmp_path / "log")) == 0
    assert "3 steps; the policy would decide otherwise in 0" in capsys.readouterr().out


def test_another_decision_is_found():
    changed = [r._replace(limits=Limits(max_num_seqs=1)) for r in records()]
    assert replay.differences(changed) == [2]
