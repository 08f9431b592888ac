//! The loop of one connection between the socket, the machine and the application.

use std::time::Duration;

use sanjay_protocol::CloseCode;
use tokio::time::{Instant, sleep_until, timeout};

use super::{
    driver::{Driver, Ended},
    error::ConnectionError,
    raw::{Io, RawConnection, into_text},
};

/// A server that answers its heartbeat but not a command for so long is left for another.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long leaving a connection waits for the acks to be durable.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(5);

/// When the connection was seen alive, and when that was looked at.
struct Life {
    heartbeat: Duration,
    silence: Duration,
    /// The last frame.
    heard: Instant,
    /// The last time that the socket was not read because the application was behind; until then nothing can
    /// have been heard.
    deaf: Instant,
    /// The last ping of ours.
    pinged: Instant,
}

impl Driver {
    /// Serves the connection until it ends or is left.
    pub(super) async fn session(&mut self, mut connection: RawConnection, heartbeat: Duration) -> Ended {
        let served = Box::pin(self.serve(&mut connection, heartbeat)).await;
        let goaway = self.machine.goaway();
        match served {
            Ok(ended) => {
                self.farewell(connection).await;
                ended
            }
            Err(error) => {
                let error = connection.explain(error).await;
                let drained = matches!(
                    &error,
                    ConnectionError::Lost { .. } | ConnectionError::Closed { code: 1001 | 1012, .. }
                );
                match goaway {
                    Some(at) if drained => Ended::Goaway(at),
                    _ => Ended::Failed(error),
                }
            }
        }
    }

    async fn serve(
        &mut self,
        connection: &mut RawConnection,
        heartbeat: Duration,
    ) -> Result<Ended, ConnectionError> {
        let now = Instant::now();
        let silence = heartbeat + self.options.silence_grace;
        let mut life = Life { heartbeat, silence, heard: now, deaf: now, pinged: now };
        for envelope in connection.take_received() {
            self.machine.event(envelope, now)?;
        }
        self.heard_of_tokens(now);
        loop {
            let now = Instant::now();
            self.machine.deliver(now);
            self.machine.advance(now);
            // One message at a time waits for the socket, so that what is unsent stays in the machine's bounds.
            if !connection.is_unflushed()
                && let Some(bytes) = self.machine.compose(now)
            {
                connection.start_text(into_text(bytes))?;
            }
            let reading = self.machine.wants_input();
            if !reading {
                life.deaf = now;
            }
            let next = self.next_tick(&life, reading);
            tokio::select! {
                io = connection.drive(reading) => match io? {
                    Io::Flushed => {}
                    Io::Control => life.heard = Instant::now(),
                    Io::Text(text) => {
                        life.heard = Instant::now();
                        self.machine.input(&text, life.heard)?;
                        self.heard_of_tokens(life.heard);
                    }
                },
                token = self.renewal.next() => self.renewed(token, Instant::now()),
                () = self.machine.room() => {}
                Some(ready) = self.ready.recv(), if self.machine.takes_answers() => self.machine.ready(ready),
                request = self.requests.recv(), if self.machine.takes_requests() => match request {
                    Some(request) => self.machine.request(request, Instant::now()),
                    None => return Ok(Ended::Asked),
                },
                () = self.closing.notified() => return Ok(Ended::Asked),
                () = sleep_until(next) => {
                    if let Some(ended) = self.tick(connection, &mut life, reading)? {
                        return Ok(ended);
                    }
                }
            }
        }
    }

    fn next_tick(&self, life: &Life, reading: bool) -> Instant {
        let own =
            if reading { life.heard.max(life.deaf) + life.silence } else { life.pinged + life.heartbeat / 2 };
        let answer = self.machine.oldest_pending().filter(|_| reading);
        let answer = answer.map(|sent| sent.max(life.deaf) + ANSWER_TIMEOUT);
        let others = [answer, self.machine.next_retry(), self.machine.goaway()];
        others.into_iter().flatten().fold(own, Instant::min)
    }

    fn tick(
        &self,
        connection: &mut RawConnection,
        life: &mut Life,
        reading: bool,
    ) -> Result<Option<Ended>, ConnectionError> {
        let now = Instant::now();
        if self.machine.goaway().is_some_and(|at| at <= now) {
            return Ok(Some(Ended::Goaway(now)));
        }
        if !reading {
            if now >= life.pinged + life.heartbeat / 2 {
                // The server's heartbeat lies unread: a ping says that this side lives.
                if !connection.is_unflushed() {
                    connection.start_ping()?;
                }
                life.pinged = now;
            }
            return Ok(None);
        }
        if now >= life.heard.max(life.deaf) + life.silence {
            return Err(ConnectionError::Silent(life.silence));
        }
        match self.machine.oldest_pending() {
            Some(sent) if now >= sent.max(life.deaf) + ANSWER_TIMEOUT => {
                Err(ConnectionError::Timeout { what: "answer", within: ANSWER_TIMEOUT })
            }
            _ => Ok(None),
        }
    }

    /// Leaves a connection: sends what is ready, waits until the acks are durable, closes.
    async fn farewell(&mut self, mut connection: RawConnection) {
        let done = timeout(FAREWELL_TIMEOUT, Box::pin(self.settle_up(&mut connection))).await;
        if !matches!(done, Ok(Ok(()))) {
            tracing::debug!("the connection was left before every ack was confirmed");
        }
        connection.close(CloseCode::Done).await;
    }

    async fn settle_up(&mut self, connection: &mut RawConnection) -> Result<(), ConnectionError> {
        while let Ok(ready) = self.ready.try_recv() {
            self.machine.ready(ready);
        }
        loop {
            let now = Instant::now();
            self.machine.advance(now);
            if !connection.is_unflushed() {
                match self.machine.compose(now) {
                    Some(bytes) => connection.start_text(into_text(bytes))?,
                    None if self.machine.acks_are_durable() => return Ok(()),
                    None => {}
                }
            }
            let retry = self.machine.next_retry().unwrap_or(now + FAREWELL_TIMEOUT);
            tokio::select! {
                io = connection.drive(true) => if let Io::Text(text) = io? {
                    self.machine.input(&text, Instant::now())?;
                    self.machine.discard_backlog();
                },
                () = sleep_until(retry) => {}
            }
        }
    }
}
