"""Episodes are played as the levels say; plans, calls, controls and what a planner saw are counted right."""

import numpy as np
import pytest
import torch

from tests.vla.fixture import config
from tokensieve.datasets import read_video
from tokensieve.datasets.trajectories import generate_episodes, render_grids
from tokensieve.errors import BadOption
from tokensieve.vla import (
    BehaviourAgent,
    BehaviourTokeniser,
    CloningAgent,
    CloningConfig,
    CloningPolicy,
    EpisodeTrace,
    Planned,
    RandomAgent,
    Windows,
    babyai_config,
    cut_trunks,
    draw_episode,
    named_cells,
    num_plans,
    roll_out,
    summarise,
    words_of,
    write_episodes_video,
)
from tokensieve.vla.agents import Step, cycle, rows_of

pytest.importorskip("minigrid")
LEVELS = ["BabyAI-GoToLocal-v0", "BabyAI-PickupDist-v0"]


@pytest.fixture(scope="module")
def expert():
    return generate_episodes(LEVELS, 6, split="test")


@pytest.fixture(scope="module")
def tokeniser():
    return BehaviourTokeniser(babyai_config(levels=(5, 3), width=16, num_channels=4, num_heads=2))


class Replay:
    """Does what it is told to, episode by episode."""

    def __init__(self, actions):
        self.actions = actions

    def begin(self, instructions):
        self.step, self.rows_seen = -1, []

    def act(self, frames, rows):
        self.step += 1
        self.rows_seen.append(rows.tolist())
        return Step(actions=torch.tensor([int(self.actions[row][self.step]) for row in rows]), num_calls=1)


class Stub:
    """A planner that says the number of the instruction's letters and keeps the first cells."""

    levels, network = (5, 3), torch.nn.Linear(1, 1)

    def __init__(self, num_kept=49, memory=()):
        self.asked, self.num_kept, self.memory, self.memories = [], num_kept, memory, []

    def plan(self, frames, instructions, memory=None, *, generator=None):
        self.asked.append((frames, list(instructions)))
        self.memories.append(memory)
        digits = torch.tensor([[len(text) % 5, len(self.asked) % 3] for text in instructions])
        kept = (torch.arange(49) < self.num_kept).expand(len(frames), -1)
        return Planned(digits=digits, kept=kept, num_visual=float(self.num_kept))


def test_the_bots_actions_succeed_in_the_same_worlds(expert):
    agent = Replay([expert[k].actions["action"] for k in range(6)])
    traces = roll_out(agent, LEVELS, 6)
    assert all(trace.success for trace in traces)
    assert [len(trace) for trace in traces] == [len(expert[k]) for k in range(6)]
    assert [trace.level for trace in traces] == LEVELS * 3
    for k, trace in enumerate(traces):
        assert trace.instruction == trace.told == expert[k].instruction
        assert np.array_equal(np.stack(trace.grids), expert[k].info["grid"])
        assert trace.num_calls == len(trace)
    assert summarise(traces)["calls_per_step"] == 1
    cut = roll_out(agent, LEVELS, 6, max_steps=min(map(len, traces)))
    assert sum(trace.success for trace in cut) == sum(len(trace) == min(map(len, traces)) for trace in traces)
    assert {len(trace) for trace in cut} == {min(map(len, traces))}


def test_batches_change_no_world(expert):
    traces = roll_out(Replay([expert[k].actions["action"] for k in (3, 4, 5)]), LEVELS, 3, first=3)
    assert all(trace.success for trace in traces) and traces[0].level == LEVELS[1]
    parts = roll_out(Replay([[2, 2, 2]] * 2), LEVELS, 5, batch=2, max_steps=3)
    whole = roll_out(Replay([[2, 2, 2]] * 5), LEVELS, 5, max_steps=3)
    assert [t.seed for t in parts] == [t.seed for t in whole]
    assert all(np.array_equal(np.stack(a.grids), np.stack(b.grids)) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("interval", [1, 3, 16])
def test_the_planner_is_asked_every_so_many_steps(tokeniser, interval):
    planner = Stub()
    traces = roll_out(BehaviourAgent(planner, tokeniser, interval), LEVELS, 6, max_steps=7)
    assert [trace.num_calls for trace in traces] == [num_plans(len(trace), interval) for trace in traces]
    summary = summarise(traces)
    assert summary["plans"] == sum(len(texts) for _, texts in planner.asked)
    first = planner.asked[0]
    assert first[1] == [trace.told for trace in traces]
    assert np.array_equal(first[0].numpy(), render_grids(np.stack([trace.grids[0] for trace in traces])))
    for trace in traces:  # the code changes with a plan and not between
        says = [[len(trace.told) % 5, (step // interval + 1) % 3] for step in range(len(trace))]
        assert np.stack(trace.digits).tolist() == says
        assert [mask is not None for mask in trace.kept] == [step % interval == 0 for step in range(len(trace))]


@pytest.mark.parametrize("interval", [1, 3])
def test_the_planner_remembers_what_was_seen_so_many_steps_ago(tokeniser, interval):
    lags = (2, 5, 1)
    planner = Stub(memory=lags)
    traces = roll_out(BehaviourAgent(planner, tokeniser, interval), LEVELS, 5, max_steps=11)
    lengths = [len(trace) for trace in traces]
    assert max(lengths) > 7
    for call, memory in enumerate(planner.memories):
        step = interval * call
        running = [trace for trace in traces if len(trace) > step]
        assert memory.there.tolist() == [[step >= lag for lag in lags]] * len(running)
        for row, trace in enumerate(running):
            for place, lag in enumerate(lags):
                seen = (
                    render_grids(trace.grids[step - lag][None])[0] if step >= lag else 0 * memory.frames[0, 0].numpy()
                )
                np.testing.assert_array_equal(memory.frames[row, place], seen)


def test_who_goes_on_remembers_what_it_saw_itself(tokeniser):
    planner = Stub(memory=(1,))
    agent = BehaviourAgent(planner, tokeniser, 1)
    agent.begin(["go to the red ball"] * 4)
    for step, rows in enumerate(([0, 1, 2, 3], [1, 2, 3], [1, 3])):
        agent.act(torch.stack([torch.full((56, 56, 3), 10 * step + row) for row in rows]).byte(), torch.tensor(rows))
        seen = planner.memories[step].frames[:, 0, 0, 0, 0].tolist()
        assert seen == ([10 * (step - 1) + row for row in rows] if step else [0] * 4)


def test_windows_remember_within_their_episode(expert):
    windows, lags = Windows(expert, 4, range(1, 4)), (1, 3)
    places = torch.arange(len(windows))
    memory = windows.memory(places, lags)
    first, last = expert.starts[1], expert.starts[4]
    steps = np.arange(first, last)
    begins = expert.starts[1:4].repeat(np.diff(expert.starts[1:5]))
    for place, lag in enumerate(lags):
        there = steps - lag >= begins
        assert memory.there[:, place].tolist() == there.tolist()
        np.testing.assert_array_equal(memory.frames[:, place][there], render_grids(expert.grids[steps[there] - lag]))
        assert not memory.frames[:, place][~there].any()
    assert windows.memory(places, ()) is None


def test_the_decoder_gets_code_history_and_last_action(tokeniser, monkeypatch):
    given, act = [], tokeniser.act

    def spy(frames, codes, **options):
        given.append((codes, options["previous"], options["history"]))
        return act(frames, codes, **options)

    monkeypatch.setattr(tokeniser, "act", spy)
    (trace,) = roll_out(BehaviourAgent(Stub(), tokeniser, 3), LEVELS, 1, max_steps=7)
    assert len(given) == len(trace)
    for step, (codes, previous, history) in enumerate(given):
        wanted = tokeniser.config.fsq.digits_to_codes(torch.from_numpy(trace.digits[step])[None])
        assert torch.equal(codes, wanted)
        assert previous.tolist() == [[trace.actions[step - 1] if step else -1]]
        assert (0 if history is None else history.mask.shape[1]) == step % 3  # a plan begins a history


def test_episodes_that_end_leave_the_others_alone(tokeniser):
    """Greedy agents do in a batch what they do alone."""
    policy = CloningPolicy(
        CloningConfig(words=words_of(t.told for t in roll_out(RandomAgent(), LEVELS, 8, max_steps=1)), width=16),
        seed=3,
    )
    for make in (
        lambda: CloningAgent(policy, greedy=True),
        lambda: BehaviourAgent(Stub(), tokeniser, 5, greedy=True),
    ):
        together = roll_out(make(), LEVELS, 4, max_steps=9)
        alone = [roll_out(make(), LEVELS, 1, first=k, max_steps=9)[0] for k in range(4)]
        assert [t.actions for t in together] == [t.actions for t in alone]


def test_a_history_goes_on_with_its_own_rows(tokeniser, expert):
    frames = torch.from_numpy(render_grids(np.stack([expert[k].info["grid"][0] for k in range(3)])))
    codes = tokeniser.config.fsq.digits_to_codes(torch.tensor([[0, 0], [2, 1], [4, 2]]))
    _, history = tokeniser.act(frames, codes)
    fewer = rows_of(history.forget(torch.tensor([False, False, True])), torch.tensor([False, True, True]))
    assert fewer.mask.tolist() == [[True], [False]]
    for part, whole in zip(fewer.layers, history.layers, strict=True):
        assert torch.equal(part[0], whole[0][1:]) and torch.equal(part[1], whole[1][1:])


def test_rows_of_a_batch_that_ended_are_not_acted_for(expert):
    agent = Replay([expert[k].actions["action"] for k in range(6)])
    traces = roll_out(agent, LEVELS, 6)
    for step, rows in enumerate(agent.rows_seen):
        assert rows == [row for row, trace in enumerate(traces) if len(trace) > step]


def test_controls(tokeniser):
    told = roll_out(RandomAgent(), LEVELS, 6, max_steps=2, shuffle_instructions=True)
    source = cycle(6, 0).tolist()
    assert [t.told for t in told] == [told[source[k]].instruction for k in range(6)]
    assert sorted(source) == list(range(6)) and all(k != other for k, other in enumerate(source))
    agent = BehaviourAgent(Stub(), tokeniser, 2, shuffle_codes=True)
    traces = roll_out(agent, LEVELS, 6, max_steps=2)
    for k, trace in enumerate(traces):
        assert trace.told == trace.instruction
        assert trace.digits[0].tolist() == [len(traces[source[k]].told) % 5, 1]


def test_random_actions_repeat_with_their_seed():
    runs = [[t.actions for t in roll_out(RandomAgent(seed=seed), LEVELS, 2, max_steps=20)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2] and {a for actions in runs[0] for a in actions} == set(range(7))


def test_named_cells():
    grids = np.zeros((3, 7, 7, 3), dtype=np.uint8)
    grids[:, 2, 5] = (6, 0, 0)  # a red ball in column 2, row 5
    grids[:, 4, 1] = (5, 0, 0)  # a red key
    grids[:, 6, 0] = (6, 2, 0)  # a blue ball
    cells = named_cells(["go to the red ball", "pick up a ball", "go to a red object behind you"], grids)
    assert [np.argwhere(c).tolist() for c in cells] == [[[5, 2]], [[0, 6], [5, 2]], [[1, 4], [5, 2]]]
    both = named_cells(["put the red key next to the blue ball"], grids[:1])
    assert np.argwhere(both[0]).tolist() == [[0, 6], [1, 4]]
    assert not named_cells(["open the door"], grids[:1]).any()
    for texts, views in ((["dance"], grids[:1]), (["go to a ball"], grids), (["go to a ball"], grids[0])):
        with pytest.raises(BadOption):
            named_cells(texts, views)


def test_how_often_what_is_named_was_kept(tokeniser):
    """The stub keeps all cells, or the first alone."""
    shares = []
    for num_kept in (49, 1):
        agent = BehaviourAgent(Stub(num_kept), tokeniser, 1, seed=1)
        traces = roll_out(agent, "BabyAI-GoToLocal-v0", 4, max_steps=5)
        summary = summarise(traces)
        cells = named_cells(
            [trace.told for trace in traces for _ in trace.grids], np.stack([g for t in traces for g in t.grids])
        ).reshape(-1, 49)
        assert summary["named_in_view"] == cells.any(1).sum() and summary["visual_tokens"] == num_kept
        assert summary["named_kept"] == pytest.approx(cells[:, :num_kept].any(1).sum() / cells.any(1).sum())
        shares.append(summary["named_kept"])
    assert shares[0] == 1 > shares[1]


def test_windows_begin_at_every_step():
    episodes = generate_episodes(LEVELS, 3, noise=0.5)
    windows, length = Windows(episodes, 4, range(1, 3)), 4
    assert len(windows) == sum(len(episodes[k]) for k in (1, 2))
    trunks = windows.trunks(torch.arange(len(windows)))
    place = 0
    for k in (1, 2):
        one = episodes[k]
        frames = torch.from_numpy(np.array(one.frames()))
        labels = torch.from_numpy(one.actions["action"].astype(np.int64))
        taken = [-1, *one.actions["taken"].tolist()]
        for start in range(len(one)):
            wanted = cut_trunks(frames[start : start + length], labels[start : start + length], length)
            for name in ("frames", "actions", "mask"):
                assert torch.equal(getattr(trunks, name)[place], getattr(wanted, name)[0])
            valid = int(wanted.mask.sum())
            assert trunks.previous[place, :valid, 0].tolist() == taken[start : start + valid]
            assert torch.equal(windows.frames(torch.tensor([place]))[0], frames[start])
            assert windows.instructions(torch.tensor([place])) == [one.instruction]
            place += 1
    assert (episodes.taken != episodes.actions).any()
    for wrong in ({"length": 0}, {"which": range(2, 2)}, {"which": range(0, 4)}):
        with pytest.raises(BadOption):
            Windows(episodes, **{"length": 4} | wrong)


def test_an_episode_is_drawn_with_its_instruction_and_code(tokeniser, tmp_path):
    (trace,) = roll_out(BehaviourAgent(Stub(10), tokeniser, 2), "BabyAI-GoToLocal-v0", 1, max_steps=4)
    pictures = draw_episode(trace, (5, 3))
    assert pictures.shape == (len(trace) + 5, 336, 600, 3)
    plain = render_grids(np.stack(trace.grids)).repeat(6, 1).repeat(6, 2)
    assert np.array_equal(pictures[1, :, :336], plain[1])  # no plan was made here, so nothing is dimmed
    assert not np.array_equal(pictures[0, :, :336], plain[0])
    assert np.array_equal(pictures[0, :48, :336], plain[0, :48])  # the first row of cells was kept
    before, trace.told = pictures[:, :, 336:], "open a door"
    assert (before != draw_episode(trace, (5, 3))[:, :, 336:]).any((1, 2, 3)).all()
    trace.told, trace.digits[0] = trace.instruction, (trace.digits[0] + 1) % 3
    changed = (before != draw_episode(trace, (5, 3))[:, :, 336:]).any((1, 2, 3))
    assert changed[0] and not changed[1:].any()
    write_episodes_video(tmp_path / "v.mp4", [trace], (5, 3))
    assert read_video(tmp_path / "v.mp4", fps=3).data.shape[1:] == (336, 600, 3)
    with pytest.raises(BadOption, match="levels"):
        draw_episode(trace)
    with pytest.raises(BadOption):
        write_episodes_video(tmp_path / "v.mp4", [])


def test_what_is_refused(tokeniser):
    for interval in (0, -1, 2.0, True):
        with pytest.raises(BadOption):
            BehaviourAgent(Stub(), tokeniser, interval)
    with pytest.raises(BadOption, match="levels"):
        BehaviourAgent(Stub(), BehaviourTokeniser(config(levels=(3, 5))))
    for options in ({"num_episodes": 0}, {"levels": []}, {"levels": "BabyAI-No-v0"}, {"max_steps": 0}, {"batch": 0}):
        with pytest.raises(BadOption):
            roll_out(RandomAgent(), **{"levels": LEVELS, "num_episodes": 1} | options)
    with pytest.raises(BadOption):
        summarise([])
    done = EpisodeTrace(level="", seed=0, instruction="go to a ball", told="", success=True, actions=[2], num_calls=1)
    assert summarise([done])["visual_tokens"] is summarise([done])["named_kept"] is None
