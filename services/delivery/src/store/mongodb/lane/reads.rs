//! What a lane reads before it writes.

use std::collections::HashMap;

use mongodb::{bson::doc, options::FindOptions};

use super::{
    super::{
        append::{self, KeysBeside},
        documents::{BodiesDoc, InboxDoc, KeyDoc, bodies_between},
        inbox::{Inbox, Open},
    },
    Lane,
};
use crate::{metrics::StoreOperation, store::StoreError};

impl Lane {
    /// Reads the inboxes of which too little is known.
    pub(super) async fn read(&mut self, users: &[String]) -> Result<(), StoreError> {
        let mut wanted = Vec::new();
        for name in users {
            let Some(user) = self.users.get(name) else { continue };
            // Arming needs no knowledge.
            if user.only_arms() {
                continue;
            }
            let unanswered = user.unanswered.is_some();
            match self.inboxes.get_mut(name) {
                Some(inbox) if !inbox.stale && !inbox.shared && !unanswered => {
                    inbox.fresh = false;
                    inbox.looked_beside.clear();
                    inbox.beside.clear();
                    inbox.buried.clear();
                }
                _ => wanted.push(name.clone()),
            }
        }
        self.read_inboxes(&wanted).await
    }

    pub(super) async fn read_inboxes(&mut self, users: &[String]) -> Result<(), StoreError> {
        if users.is_empty() {
            return Ok(());
        }
        let projection = doc! {
            "messages.p": 0, "receipts.s": 0, "receipts.a": 0, "receipts.t": 0, "receipts.c": 0, "log": 0,
        };
        let found: Vec<InboxDoc> =
            self.database.find_inboxes(StoreOperation::ReadState, users, projection).await?;
        let mut found: HashMap<String, InboxDoc> =
            found.into_iter().map(|document| (document.user.clone(), document)).collect();
        for name in users {
            let read = match found.remove(name) {
                Some(document) => Inbox::new(document)?,
                None => Inbox::none(self.database.store_id, name),
            };
            match self.inboxes.get_mut(name) {
                Some(inbox) => inbox.refresh(read),
                None => drop(self.inboxes.insert(name.clone(), read)),
            }
        }
        Ok(())
    }

    /// Looks for dedupe keys that have left their inbox. Together with the condition of the write that is enough:
    /// a key that comes to an inbox raises its head.
    pub(super) async fn read_keys(&self, users: &[String]) -> Result<KeysBeside, StoreError> {
        let (mut ids, mut owners) = (Vec::new(), Vec::new());
        for name in users {
            let (Some(user), Some(inbox)) = (self.users.get(name), self.inboxes.get(name)) else { continue };
            let keys = append::keys_to_look_for(name, &user.appends, inbox);
            if !keys.is_empty() {
                owners.push(name.clone());
                ids.extend(keys);
            }
        }
        if ids.is_empty() {
            return Ok(KeysBeside::new());
        }
        #[derive(serde::Deserialize)]
        struct Found {
            #[serde(rename = "_id")]
            id: String,
            #[serde(flatten)]
            key: KeyDoc,
        }
        let filter = doc! { "_id": { "$in": &ids }, "u": { "$in": owners } };
        let found: Vec<Found> =
            self.database.find_beside(StoreOperation::ReadState, filter, FindOptions::default()).await?;
        let mut beside: KeysBeside = ids.into_iter().map(|id| (id, None)).collect();
        beside.extend(found.into_iter().map(|found| (found.id, Some(found.key))));
        Ok(beside)
    }

    /// Reads bodies beside an inbox, without their payloads.
    pub(super) async fn read_beside(&mut self, name: &str, from: u64, to: u64) -> Result<(), StoreError> {
        let options = FindOptions::builder().projection(doc! { "messages.p": 0 }).build();
        let found: Vec<BodiesDoc> = self
            .database
            .find_beside(StoreOperation::ReadState, bodies_between(name, from, to), options)
            .await?;
        if let Some(inbox) = self.inboxes.get_mut(name) {
            let messages = found.iter().flat_map(|bodies| &bodies.messages);
            let open = messages.map(|message| Open::new(message).map(|open| (open.seq, open)));
            let open: Vec<(u64, Open)> = open.collect::<Result<_, _>>()?;
            inbox.beside.extend(open);
            inbox.looked_beside.push((from, to));
        }
        Ok(())
    }
}
