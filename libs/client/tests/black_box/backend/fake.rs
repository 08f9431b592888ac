//! A delivery node that does what a test says.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures::{Stream, StreamExt};
use sanjay_client::protocol::ErrorCode;
use sanjay_proto::delivery::v1::{
    self, Accepted, DeadLetter, DeliveryEvent, Error, GetDeadLetterRequest, GetDeliveryRequest,
    GetDeliveryResponse, GetTraceRequest, GetTraceResponse, JoinRequest, JoinResponse, LeaveRequest,
    LeaveResponse, ListDeadLettersRequest, ListDeadLettersResponse, ListDeliveriesRequest,
    ListDeliveriesResponse, ListMembersRequest, ListMembersResponse, PublishRequest, PublishResponse,
    PublishStreamResponse, PurgeDeadLettersRequest, PurgeDeadLettersResponse, Receipt, ReceiptsRequest,
    ReceiptsResponse, RedriveDeadLettersRequest, RedriveDeadLettersResponse, SendRequest, SendResponse,
    SendResult, SendStreamResponse, WatchDeliveriesRequest, WatchDeliveriesResponse,
    delivery_server::Delivery, publish_stream_response, send_result, send_stream_response,
    watch_deliveries_response,
};
use tonic::{Request, Response, Status, Streaming};

/// What the next call of `Send` or `Publish` does.
pub(super) enum Answer {
    Fail(Status),
    /// Accepts all but these users, which get a retryable error.
    AllBut(&'static [&'static str]),
}

#[derive(Clone, Default)]
pub(super) struct Fake {
    pub(super) answers: Arc<Mutex<VecDeque<Answer>>>,
    pub(super) asked: Arc<Mutex<Vec<Vec<String>>>>,
    /// What the next redrive says.
    pub(super) redrive: Arc<Mutex<Vec<Result<RedriveDeadLettersResponse, Status>>>>,
}

impl Fake {
    fn answer(&self, users: Vec<String>) -> Result<SendResponse, Status> {
        self.asked.lock().unwrap().push(users.clone());
        let refused = match self.answers.lock().unwrap().pop_front() {
            Some(Answer::Fail(status)) => return Err(status),
            Some(Answer::AllBut(users)) => users,
            None => &[],
        };
        let result = |user: String| {
            let result = if refused.contains(&user.as_str()) {
                let code = ErrorCode::Unavailable.as_str().to_owned();
                send_result::Result::Error(Error {
                    code,
                    message: "away".into(),
                    retryable: true,
                    retry_after_ms: 1,
                })
            } else {
                send_result::Result::Accepted(Accepted {
                    message_id: format!("id of {user}"),
                    seq: 1,
                    duplicate: false,
                    deliver_at_us: 0,
                })
            };
            SendResult { user, result: Some(result) }
        };
        Ok(SendResponse { results: users.into_iter().map(result).collect() })
    }

    pub(super) fn asked(&self) -> Vec<Vec<String>> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    pub(super) fn next(&self, answers: impl IntoIterator<Item = Answer>) {
        self.answers.lock().unwrap().extend(answers);
    }
}

fn publish(request: &PublishRequest) -> PublishResponse {
    PublishResponse {
        message_id: request.channel.clone(),
        epoch: "a".into(),
        offset: 1,
        publication: if request.durable { 3 } else { 0 },
        members: 7,
        duplicate: request.durable,
    }
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Delivery for Fake {
    type PublishStreamStream = Replies<PublishStreamResponse>;
    type SendStreamStream = Replies<SendStreamResponse>;
    type RedriveDeadLettersStream = Replies<RedriveDeadLettersResponse>;
    type ReceiptsStream = Replies<ReceiptsResponse>;
    type WatchDeliveriesStream = Replies<WatchDeliveriesResponse>;

    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let request = request.into_inner();
        self.answer(vec![request.channel.clone()])?;
        Ok(Response::new(publish(&request)))
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<SendResponse>, Status> {
        self.answer(request.into_inner().users).map(Response::new)
    }

    async fn publish_stream(
        &self,
        requests: Request<Streaming<PublishRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let replies = requests.into_inner().map(|request| {
            let request = request?;
            let result = if request.channel == "bad" {
                let code = ErrorCode::BadRequest.as_str().to_owned();
                publish_stream_response::Result::Error(Error {
                    code,
                    message: "bad".into(),
                    ..Error::default()
                })
            } else {
                publish_stream_response::Result::Published(publish(&request))
            };
            Ok(PublishStreamResponse { result: Some(result) })
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn send_stream(
        &self,
        requests: Request<Streaming<SendRequest>>,
    ) -> Result<Response<Self::SendStreamStream>, Status> {
        let fake = self.clone();
        let replies = requests.into_inner().map(move |request| {
            let sent = fake.answer(request?.users)?;
            Ok(SendStreamResponse { result: Some(send_stream_response::Result::Sent(sent)) })
        });
        Ok(Response::new(Box::pin(replies)))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let JoinRequest { channel, users } = request.into_inner();
        self.answer([vec![channel], users.clone()].concat())?;
        Ok(Response::new(JoinResponse { joined: users.len() as u64, members: 7 }))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        let LeaveRequest { channel, users } = request.into_inner();
        self.answer([vec![channel], users.clone()].concat())?;
        Ok(Response::new(LeaveResponse { left: users.len() as u64, members: 5 }))
    }

    async fn get_history(
        &self,
        request: Request<v1::GetHistoryRequest>,
    ) -> Result<Response<v1::GetHistoryResponse>, Status> {
        let v1::GetHistoryRequest { since_epoch: epoch, since_offset: offset, limit, .. } =
            request.into_inner();
        let message = v1::HistoryMessage { offset: offset + 1, ..v1::HistoryMessage::default() };
        Ok(Response::new(v1::GetHistoryResponse {
            epoch,
            offset: limit.into(),
            messages: vec![message],
            more: true,
        }))
    }

    async fn list_members(
        &self,
        request: Request<ListMembersRequest>,
    ) -> Result<Response<ListMembersResponse>, Status> {
        let ListMembersRequest { channel, page_size, page_token } = request.into_inner();
        let users = vec![channel];
        let next_page_token = format!("{page_token} and {page_size}");
        Ok(Response::new(ListMembersResponse { users, next_page_token }))
    }

    async fn get_delivery(
        &self,
        _: Request<GetDeliveryRequest>,
    ) -> Result<Response<GetDeliveryResponse>, Status> {
        Err(Status::not_found("no such message"))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        let ListDeadLettersRequest { filter, page_size, page_token } = request.into_inner();
        self.answer(vec![filter.unwrap().user])?;
        let next_page_token = format!("{page_token} and {page_size}");
        Ok(Response::new(ListDeadLettersResponse { dead_letters: Vec::new(), next_page_token }))
    }

    async fn get_dead_letter(
        &self,
        _: Request<GetDeadLetterRequest>,
    ) -> Result<Response<DeadLetter>, Status> {
        Err(Status::not_found("no such letter"))
    }

    async fn redrive_dead_letters(
        &self,
        request: Request<RedriveDeadLettersRequest>,
    ) -> Result<Response<Self::RedriveDeadLettersStream>, Status> {
        if request.metadata().contains_key("grpc-timeout") {
            return Err(Status::invalid_argument("a redrive has no deadline"));
        }
        let answers = std::mem::take(&mut *self.redrive.lock().unwrap());
        Ok(Response::new(Box::pin(futures::stream::iter(answers))))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<PurgeDeadLettersRequest>,
    ) -> Result<Response<PurgeDeadLettersResponse>, Status> {
        self.answer(vec![request.into_inner().filter.unwrap().user])?;
        let more = self.asked.lock().unwrap().len() < 3;
        Ok(Response::new(PurgeDeadLettersResponse { purged: 2, more }))
    }

    async fn get_trace(&self, _: Request<GetTraceRequest>) -> Result<Response<GetTraceResponse>, Status> {
        Ok(Response::new(GetTraceResponse { milestones: Vec::new(), missing: vec!["router".into()] }))
    }

    async fn receipts(
        &self,
        request: Request<ReceiptsRequest>,
    ) -> Result<Response<Self::ReceiptsStream>, Status> {
        if request.metadata().contains_key("grpc-timeout") {
            return Err(Status::invalid_argument("a stream has no deadline"));
        }
        let ReceiptsRequest { cursor, follow, .. } = request.into_inner();
        if cursor == "old" {
            return Err(Status::out_of_range("receipts behind it are gone"));
        }
        let batch = |n: usize| {
            let receipts = vec![Receipt { user: format!("user {n}"), ..Receipt::default() }];
            ReceiptsResponse { receipts, cursor: format!("{cursor}{n}"), tail: n == 2 }
        };
        let mut answers = vec![Ok(batch(1)), Ok(batch(2))];
        if follow {
            answers.push(Err(Status::unavailable("this server shuts down")));
        }
        Ok(Response::new(Box::pin(futures::stream::iter(answers))))
    }

    async fn list_deliveries(
        &self,
        request: Request<ListDeliveriesRequest>,
    ) -> Result<Response<ListDeliveriesResponse>, Status> {
        let ListDeliveriesRequest { user, page_token, .. } = request.into_inner();
        self.answer(vec![user])?;
        let next_page_token = format!("{page_token} and more");
        Ok(Response::new(ListDeliveriesResponse { deliveries: Vec::new(), next_page_token }))
    }

    async fn watch_deliveries(
        &self,
        _: Request<WatchDeliveriesRequest>,
    ) -> Result<Response<Self::WatchDeliveriesStream>, Status> {
        use watch_deliveries_response::Result::{Event, Missed};
        let event = Event(DeliveryEvent { user: "bob".into(), ..DeliveryEvent::default() });
        let answers = [None, Some(event), None, Some(Missed(3))];
        let answers = answers.map(|result| Ok(WatchDeliveriesResponse { result }));
        Ok(Response::new(Box::pin(futures::stream::iter(answers))))
    }
}
