"""Each of Sanjay's own processes dies once, while messages go on."""

from __future__ import annotations

from .place import Place
from .probe import Probe

# Enough that readers are on every edge, as good as certainly.
READERS = 8
# Sent and published after each death, at least.
MESSAGES = 40


def each_process_is_killed(place: Place) -> None:
    """Nothing that was accepted is lost, doubled or swapped; the supervisor brings each process back."""
    probe = Probe(place, READERS)
    probe.start()
    spread = place.connections()
    assert sum(spread.values()) >= READERS and sum(map(bool, spread.values())) >= 2, spread
    killed = place.ours()
    assert len(killed) == 7, killed
    for name in killed:
        place.kill(name)
        probe.goes_on(MESSAGES)
    problems = probe.end()
    print(f"    {len(killed)} killed; {probe.summary()}")
    print(f"    repeated: {dict(probe.sender.repeats)}, {dict(probe.publisher.repeats)}")
    assert not problems, "\n".join(problems)
    accepted = sum(map(len, probe.sender.accepted.values()))
    assert min(accepted, len(probe.publisher.published)) >= MESSAGES * len(killed), probe.summary()
    assert sum(reader.connections for reader in probe.readers) > READERS, "no reader had to come back"
