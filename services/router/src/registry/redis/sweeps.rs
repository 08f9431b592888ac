//! Removes sessions that nobody vouches for: step by step, and each only as it was seen.

use std::{collections::HashMap, sync::Arc};

use redis::{Pipeline, Value};

use super::{
    record::{EdgeRecord, EdgeSession},
    sessions::{STEP, Sessions},
};
use crate::registry::{Attachment, EdgeRef, RegistryError};

/// Steps of removal that one [`Sessions::maintain`] makes.
const MAINTAIN_STEPS: usize = 16;

impl Sessions {
    pub(super) async fn sweep(&self, attachment: &Attachment) -> Result<usize, RegistryError> {
        if !self.known.is_quiet() {
            return Err(self.known.unavailable("it failed within the last lease, so nothing is swept yet"));
        }
        let mut steps = usize::MAX;
        let (removed, _) = self.sweep_steps(attachment, &mut steps).await?;
        Ok(removed)
    }

    /// Sweeps in steps, for as long as some are left. Returns how many sessions went, and whether all did that
    /// had to.
    async fn sweep_steps(
        &self,
        attachment: &Attachment,
        steps: &mut usize,
    ) -> Result<(usize, bool), RegistryError> {
        let name = self.known.keys.edge_sessions(&attachment.edge.id);
        let Some(attached) = self.attached(attachment).await? else { return Ok((0, true)) };
        let (mut removed, mut cursor) = (0, 0);
        while *steps > 0 {
            *steps -= 1;
            let (next, mut found) = self.scan(&name, cursor).await?;
            found.retain(|session| !attached || session.number != attachment.number);
            for step in steps_of(&found) {
                match self.remove(attachment, step).await? {
                    Some(count) => removed += count,
                    None => return Ok((removed, true)),
                }
            }
            cursor = next;
            if cursor == 0 {
                return Ok((removed, true));
            }
        }
        Ok((removed, false))
    }

    /// Whether the attachment lasts; nothing when there is a newer one, or none at all.
    async fn attached(&self, attachment: &Attachment) -> Result<Option<bool>, RegistryError> {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("HGET").arg(self.known.keys.edges()).arg(&*attachment.edge.id);
        let values = self.pool.send("edge", &pipeline).await?;
        let text: Option<String> = self.read(values.into_iter().next().unwrap_or(Value::Nil))?;
        let record = text.as_deref().and_then(EdgeRecord::parse);
        Ok(record.filter(|record| record.number == attachment.number).map(|record| record.attached))
    }

    async fn scan(&self, name: &str, cursor: u64) -> Result<(u64, Vec<EdgeSession>), RegistryError> {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("HSCAN").arg(name).arg(cursor).arg("COUNT").arg(STEP);
        let values = self.pool.send("scan", &pipeline).await?;
        let (next, found): (u64, Vec<(Vec<u8>, String)>) =
            self.read(values.into_iter().next().unwrap_or(Value::Nil))?;
        let sessions = found.into_iter().filter_map(|(field, text)| EdgeSession::parse(&field, text));
        Ok((next, sessions.collect()))
    }

    /// Nothing when there is a newer attachment.
    async fn remove(
        &self,
        attachment: &Attachment,
        sessions: &[EdgeSession],
    ) -> Result<Option<usize>, RegistryError> {
        let keys = &self.known.keys;
        let edge = &attachment.edge.id;
        let mut names = vec![keys.edges(), keys.edge_sessions(edge)];
        names.extend(sessions.iter().map(|session| keys.user_sessions(&session.user)));
        let script = &self.scripts.sweep;
        let mut call = script.call(&names);
        call.arg(&**edge).arg(attachment.number);
        for session in sessions {
            call.arg(&session.session).arg(&session.text);
        }
        let removed: i64 = self.pool.eval(script, &call).await?;
        Ok(usize::try_from(removed).ok())
    }

    /// Watches over the attachments, and removes a bounded part of what nobody vouches for.
    pub(super) async fn maintain(&self) -> Result<(), RegistryError> {
        let result = self.try_maintain().await;
        if result.is_err() {
            self.watch.forget();
        }
        result
    }

    async fn try_maintain(&self) -> Result<(), RegistryError> {
        let mut pipeline = Pipeline::new();
        pipeline.cmd("HGETALL").arg(self.known.keys.edges());
        pipeline.cmd("HGETALL").arg(self.known.keys.left());
        let mut values = self.pool.send("maintain", &pipeline).await?;
        let left: HashMap<u64, String> = self.read(values.pop().unwrap_or(Value::Nil))?;
        let edges: HashMap<String, String> = self.read(values.pop().unwrap_or(Value::Nil))?;
        let edges: Vec<_> = edges.into_iter().map(|(id, text)| (id.into(), text.into())).collect();
        for (edge, seen) in self.watch.look(&edges) {
            if self.known.is_quiet() {
                self.abandon(edge, &seen).await?;
            }
        }
        let mut steps = MAINTAIN_STEPS;
        self.sweep_abandoned(&mut steps).await?;
        for (number, edge) in left {
            self.collect(number, &edge, &mut steps).await?;
        }
        Ok(())
    }

    /// Ends an attachment whose router is gone.
    async fn abandon(&self, edge: Arc<str>, seen: &str) -> Result<(), RegistryError> {
        let Some(record) = EdgeRecord::parse(seen) else { return Ok(()) };
        let script = &self.scripts.expire;
        let mut call = script.call(&[self.known.keys.edges()]);
        call.arg(&*edge).arg(seen);
        if record.attached && !self.pool.eval::<bool>(script, &call).await? {
            return Ok(());
        }
        tracing::info!(%edge, router = %record.router, "an edge is gone that nobody else vouches for");
        let edge = EdgeRef { id: edge, incarnation: record.incarnation };
        let attachment = Attachment { edge, router: record.router, number: record.number };
        let mut abandoned = self.abandoned.lock();
        if !abandoned.contains(&attachment) {
            abandoned.push(attachment);
        }
        Ok(())
    }

    /// Removes sessions of attachments that were ended.
    async fn sweep_abandoned(&self, steps: &mut usize) -> Result<(), RegistryError> {
        while *steps > 0 && self.known.is_quiet() {
            let Some(attachment) = self.abandoned.lock().last().cloned() else { return Ok(()) };
            let (_, done) = self.sweep_steps(&attachment, steps).await?;
            if done {
                self.abandoned.lock().retain(|other| *other != attachment);
            }
        }
        Ok(())
    }

    /// Removes sessions that were set aside.
    async fn collect(&self, number: u64, edge: &str, steps: &mut usize) -> Result<(), RegistryError> {
        let keys = &self.known.keys;
        let name = keys.left_sessions(number);
        let script = &self.scripts.collect;
        while *steps > 0 {
            *steps -= 1;
            // What is removed no longer comes, so every step begins at the start.
            let (next, found) = self.scan(&name, 0).await?;
            for step in steps_of(&found) {
                let mut names = vec![keys.left(), name.clone()];
                names.extend(step.iter().map(|session| keys.user_sessions(&session.user)));
                let mut call = script.call(&names);
                call.arg(number).arg(edge);
                for session in step {
                    call.arg(&session.session).arg(&session.text);
                }
                self.pool.eval::<()>(script, &call).await?;
            }
            if next == 0 {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What one script may take at a time, at least one step: a small hash comes whole, whatever was asked for, and an
/// empty one may have something to tidy up.
fn steps_of(sessions: &[EdgeSession]) -> impl Iterator<Item = &[EdgeSession]> {
    let empty = sessions.is_empty().then_some(sessions);
    sessions.chunks(STEP).chain(empty)
}
