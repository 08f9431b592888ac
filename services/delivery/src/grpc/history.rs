//! What channels keep, for back ends: checks, asks a router, converts.

use sanjay_proto::{
    client::v1::Publication,
    delivery::v1::{GetHistoryRequest, GetHistoryResponse, HistoryMessage},
    router::v1::{HistoryRequest, HistoryResponse},
};
use sanjay_protocol::{ErrorCode, Position, json, limits::DEFAULT_HISTORY_LIMIT, recovery::ReadHistory};

use super::{Refusal, backend::BackendApi};

/// Reads a part of a channel's history.
pub(super) async fn get(api: &BackendApi, request: GetHistoryRequest) -> Result<GetHistoryResponse, Refusal> {
    let request = checked(request)?;
    let channel = request.channel.clone();
    let answer = tokio::time::timeout(api.deadline, api.paths.router.history(request)).await;
    let answer = answer.map_err(|_| Refusal::late(api.deadline))?;
    let answer = answer.map_err(|error| Refusal::new(ErrorCode::Unavailable, error.to_string()))?;
    response(&channel, answer)
}

fn checked(request: GetHistoryRequest) -> Result<HistoryRequest, Refusal> {
    let GetHistoryRequest { channel, since_epoch: epoch, since_offset: offset, limit } = request;
    if epoch.is_empty() && offset > 0 {
        let why = "since_epoch is missing; an offset belongs to an epoch, so give both or neither";
        return Err(Refusal::new(ErrorCode::BadRequest, why));
    }
    let limit = if limit == 0 { DEFAULT_HISTORY_LIMIT } else { limit };
    let since = (!epoch.is_empty()).then(|| Position { epoch: epoch.clone(), offset });
    let read = ReadHistory { channel, since, limit };
    read.check().map_err(|error| Refusal::new(error.code, error.message))?;
    Ok(HistoryRequest { channel: read.channel, epoch, offset, limit })
}

fn response(channel: &str, answer: HistoryResponse) -> Result<GetHistoryResponse, Refusal> {
    let HistoryResponse { epoch, offset, publications, lost, more, error } = answer;
    if let Some(error) = error {
        return Err(Refusal::new(ErrorCode::from_text(&error.code), error.message));
    }
    if lost {
        let why = format!(
            "the history of \"{channel}\" does not reach back to this position; its epoch is {epoch} and its newest offset \
             {offset}: ask without since"
        );
        return Err(Refusal::new(ErrorCode::NotFound, why));
    }
    let messages = publications.into_iter().map(message).collect();
    Ok(GetHistoryResponse { epoch, offset, messages, more })
}

fn message(publication: Publication) -> HistoryMessage {
    let Publication { offset, message_id, payload, publisher, time_us, trace, .. } = publication;
    HistoryMessage { offset, message_id: json::message_id(&message_id), payload, publisher, time_us, trace }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(epoch: &str, offset: u64, limit: u32) -> GetHistoryRequest {
        GetHistoryRequest { channel: "news".into(), since_epoch: epoch.into(), since_offset: offset, limit }
    }

    #[test]
    fn a_question_is_checked_before_it_is_asked() {
        let asked = checked(request("", 0, 0)).ok().map(|asked| (asked.epoch, asked.offset, asked.limit));
        assert_eq!(asked, Some((String::new(), 0, 100)));
        let asked =
            checked(request("e", 0, 1_000)).ok().map(|asked| (asked.epoch, asked.offset, asked.limit));
        assert_eq!(asked, Some(("e".into(), 0, 1_000)), "from the beginning");
        let cases = [
            (request("", 5, 0), "since_epoch is missing"),
            (request("e", 0, 1_001), "limit is 1001; 1 to 1000"),
            (request("e", 1 << 53, 0), "since.offset is"),
            (GetHistoryRequest::default(), "channel is empty"),
        ];
        for (wrong, text) in cases {
            let refused = checked(wrong).err().unwrap();
            assert!(
                refused.code == ErrorCode::BadRequest && refused.message.contains(text),
                "{}",
                refused.message
            );
        }
    }

    #[test]
    fn a_lost_position_is_not_found_and_a_refusal_keeps_its_code() {
        let lost = HistoryResponse { epoch: "e".into(), offset: 7, lost: true, ..HistoryResponse::default() };
        let refused = response("news", lost).err().unwrap();
        assert_eq!(refused.code, ErrorCode::NotFound);
        assert!(refused.message.contains("its epoch is e and its newest offset 7"), "{}", refused.message);
        let error = sanjay_proto::edge::v1::LinkError {
            code: "bad_request".into(),
            message: "no".into(),
            retryable: false,
        };
        let refused = response("news", HistoryResponse { error: Some(error), ..HistoryResponse::default() });
        assert_eq!(refused.err().map(|refused| refused.code), Some(ErrorCode::BadRequest));
    }
}
