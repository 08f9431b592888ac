"""Messages for a user who is away."""

from sanjay_api import Api

api = Api()
result = api.call("Send", users=["bob", "ann"], payload={"text": "see you"}, dedupe_key="py-1").results[0]
assert (result.user, result.accepted.seq, result.accepted.duplicate) == ("bob", 1, False), result
again = api.call("Send", users=["bob"], payload={"text": "see you"}, dedupe_key="py-1").results[0].accepted
assert (again.message_id, again.duplicate) == (result.accepted.message_id, True), again
requests = ({"users": ["bob"], "payload": {"text": str(n)}} for n in range(2, 201))
seqs = [answer.sent.results[0].accepted.seq for answer in api.stream("SendStream", requests)]
assert seqs == list(range(2, 201)), seqs
delivery = api.call("GetDelivery", user="bob", message_id=again.message_id)
assert (delivery.state, delivery.settled_us) == (1, 0), delivery
print("done")
