"""The checker of histories must find what it is there to find. Runs without a stack: `python -m unittest`."""

import unittest

from .history import Gap, Message, Publication, Subscribed, check_end, check_inbox, check_published, check_subscriber


def messages(*seqs: int) -> list[Message]:
    return [Message(seq, f"id-{seq}", f"body {seq}") for seq in seqs]


def publications(*offsets: int, epoch: str = "e") -> list[Publication]:
    return [Publication(epoch, offset, f"{epoch} {offset}") for offset in offsets]


class Inbox(unittest.TestCase):
    """One user's inbox."""

    def finds(self, text: str, accepted: list[Message], effects: list[Message]) -> None:
        problems = check_inbox("ann", accepted, effects)
        self.assertEqual(len(problems), 1, problems)
        self.assertIn(text, problems[0])

    def test_what_is_right(self):
        self.assertEqual(check_inbox("ann", messages(1, 2, 3), messages(1, 2, 3)), [])
        self.assertEqual(check_inbox("ann", [], []), [])

    def test_a_loss(self):
        self.finds("1 accepted messages never took effect: seqs 2", messages(1, 2, 3), messages(1, 3))
        self.finds("seqs 3", messages(1, 2, 3), messages(1, 2))
        self.finds("seqs 1, 2, 3, 4, 5, …", messages(*range(1, 10)), [])

    def test_twice(self):
        self.finds("seq 2 took effect twice", messages(1, 2, 3), messages(1, 2, 3, 2))
        self.finds("seq 2 took effect twice", messages(1, 2), messages(1, 2, 2))

    def test_a_swap(self):
        self.finds("seq 2 took effect after 3", messages(1, 2, 3), messages(1, 3, 2))

    def test_what_was_never_accepted(self):
        self.finds("was never accepted", messages(1), messages(1, 2))
        self.finds("was never accepted", messages(1), [Message(1, "id-1", "another body")])
        self.finds("was never accepted", messages(1), [Message(1, "another", "body 1")])

    def test_seqs_that_were_answered(self):
        for wrong in (messages(1, 3), messages(2, 1), messages(2, 3)):
            self.finds("not 1 to 2 in their order", wrong, sorted(wrong, key=lambda message: message.seq))


class Channel(unittest.TestCase):
    """A channel and its subscribers."""

    def test_offsets_that_were_answered(self):
        self.assertEqual(check_published(publications(1, 2, 5) + publications(1, epoch="f")), [])
        for wrong in (publications(1, 1), publications(2, 1), publications(1) + publications(1, epoch="f") * 2):
            self.assertEqual(len(check_published(wrong)), 1, wrong)

    def test_what_is_right(self):
        sent = publications(1, 2, 3, 4, 5, 6) + publications(1, 2, epoch="f")
        one, two, *_ = sent
        for events in (
            [Subscribed("e", 0), *sent[:6]],
            [Subscribed("e", 0), one, Subscribed("e", 4), *sent[4:6]],
            [Subscribed("e", 0), one, Gap("e", 2, 3), *sent[3:6]],
            [Subscribed("e", 0), one, two, Gap("f", 0, 0), *sent[6:]],
            [Subscribed("e", 0), one, two, Gap("f", 0, 1), sent[7]],
            [],
        ):
            self.assertEqual(check_subscriber("ann", sent, events), [], events)

    def test_what_is_wrong(self):
        sent = publications(1, 2, 3) + publications(1, epoch="f")
        one, two, three, other = sent
        for text, events in (
            ("no gap was announced", [Subscribed("e", 0), one, three]),
            ("no gap was announced", [Subscribed("e", 0), two]),
            ("no gap was announced", [Subscribed("e", 0), one, other]),
            ("no gap was announced", [Subscribed("e", 0), one, Gap("e", 2, 2), two]),
            ("came twice", [Subscribed("e", 0), one, one]),
            ("came twice", [Subscribed("e", 0), one, Subscribed("e", 0), one]),
            ("was not published", [Subscribed("e", 0), Publication("e", 1, "something else")]),
            ("was not published", [Subscribed("e", 3), Publication("e", 4, "e 4")]),
            ("a gap up to 1 was announced after offset 2", [Subscribed("e", 0), one, two, Gap("e", 0, 1)]),
        ):
            problems = check_subscriber("ann", sent, events)
            self.assertEqual(len(problems), 1, problems)
            self.assertIn(text, problems[0])

    def test_a_loss_at_the_end(self):
        sent = publications(1, 2)
        start = Subscribed("e", 0)
        for whole in ([start, *sent], [start, Gap("e", 1, 2)], [start, sent[0], Subscribed("e", 2)]):
            self.assertEqual(check_end("ann", sent, whole), [])
        for wrong in ([], [start], [start, sent[0]], [start, *sent, Subscribed("f", 2)]):
            self.assertIn("no gap was announced", check_end("ann", sent, wrong)[0])
        self.assertEqual(check_end("ann", [], []), [])


if __name__ == "__main__":
    unittest.main()
