//! What channels keep.

use sanjay_proto::delivery::v1;
use sanjay_protocol::{Position, event::Message, recovery::History};

use super::{Backend, BackendError, Client};

impl Backend {
    /// A page of what a channel keeps: the newest `limit` messages, or those that follow `since`. `limit` is 1 to 1,000, 0
    /// leaves it to the server. While `more` is true, the next page follows the last message of this one.
    ///
    /// # Errors
    /// When the server refuses it, as for a channel that keeps nothing or a position that cannot be continued without a
    /// hole, or cannot say.
    pub async fn history(
        &self,
        channel: &str,
        since: Option<&Position>,
        limit: u32,
    ) -> Result<History, BackendError> {
        let request = v1::GetHistoryRequest {
            channel: channel.to_owned(),
            since_epoch: since.map_or_else(String::new, |since| since.epoch.clone()),
            since_offset: since.map_or(0, |since| since.offset),
            limit,
        };
        let get = async |mut client: Client, request| client.get_history(request).await;
        let v1::GetHistoryResponse { epoch, offset, messages, more } = self.call(true, request, get).await?;
        let message = |message: v1::HistoryMessage| Message {
            channel: channel.to_owned(),
            offset: message.offset,
            epoch: epoch.clone(),
            message_id: message.message_id,
            payload: message.payload.into(),
            publisher: message.publisher,
            time_us: message.time_us,
            trace: message.trace,
        };
        let messages = messages.into_iter().map(message).collect();
        Ok(History { channel: channel.to_owned(), epoch, offset, messages, more })
    }
}
