//! Writes one line for each event: JSON for machines, text for people.

use std::{
    cell::Cell,
    error::Error,
    fmt::{self, Write as _},
    io::Write as _,
    sync::OnceLock,
};

use opentelemetry::{
    Context as TraceContext,
    trace::{SpanContext, TraceContextExt},
};
use serde::Serialize;
use tracing::{
    Dispatch, Event, Subscriber,
    dispatcher::WeakDispatch,
    field::{Field, Visit},
};
use tracing_subscriber::{
    Layer,
    fmt::{
        MakeWriter,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::Context,
};

use super::LogFormat;

/// A line beyond this size gives its buffer back.
const KEPT_BUFFER: usize = 16 * 1024;

thread_local! {
    static BUFFER: Cell<String> = const { Cell::new(String::new()) };
}

/// Turns events into lines. The fields of spans are not repeated in each line: the trace has them.
pub(super) struct LogLayer<W> {
    format: LogFormat,
    writer: W,
    /// The subscriber that this layer is part of.
    dispatch: OnceLock<WeakDispatch>,
}

impl<W> LogLayer<W> {
    pub(super) fn new(format: LogFormat, writer: W) -> Self {
        Self { format, writer, dispatch: OnceLock::new() }
    }

    /// The trace that the event belongs to. The thread's OpenTelemetry context follows the entered spans
    /// whatever the log filter lets through; only an explicit parent has to be looked up.
    fn trace_of(&self, event: &Event<'_>) -> Option<SpanContext> {
        let context = match event.parent() {
            Some(parent) => {
                let dispatch = self.dispatch.get()?.upgrade()?;
                tracing_opentelemetry::get_otel_context(parent, &dispatch)?.span().span_context().clone()
            }
            None => TraceContext::map_current(|context| context.span().span_context().clone()),
        };
        context.is_valid().then_some(context)
    }
}

impl<S, W> Layer<S> for LogLayer<W>
where
    S: Subscriber,
    W: for<'a> MakeWriter<'a> + 'static,
{
    fn on_register_dispatch(&self, subscriber: &Dispatch) {
        // A second registration cannot happen: a layer is part of one subscriber.
        let _ = self.dispatch.set(subscriber.downgrade());
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = BUFFER.take();
        line.clear();
        let trace = self.trace_of(event);
        match self.format {
            LogFormat::Json => write_json(&mut line, event, trace.as_ref()),
            LogFormat::Text => write_text(&mut line, event, trace.as_ref()),
        }
        // There is nobody left to tell when stderr fails.
        let _ = self.writer.make_writer_for(event.metadata()).write_all(line.as_bytes());
        if line.capacity() <= KEPT_BUFFER {
            BUFFER.set(line);
        }
    }
}

fn write_json(line: &mut String, event: &Event<'_>, trace: Option<&SpanContext>) {
    let metadata = event.metadata();
    line.push_str("{\"timestamp\":\"");
    push_time(line);
    line.push_str("\",\"level\":\"");
    line.push_str(metadata.level().as_str());
    line.push('"');
    let mut fields = JsonFields { line, target: None };
    event.record(&mut fields);
    let target = fields.target.take();
    push_entry(line, "target", target.as_deref().unwrap_or(metadata.target()));
    if let Some(trace) = trace {
        push_entry(line, "trace_id", &trace.trace_id().to_string());
        push_entry(line, "span_id", &trace.span_id().to_string());
    }
    line.push_str("}\n");
}

fn write_text(line: &mut String, event: &Event<'_>, trace: Option<&SpanContext>) {
    let metadata = event.metadata();
    push_time(line);
    let _ = write!(line, " {:>5} {}:", metadata.level().as_str(), metadata.target());
    event.record(&mut TextFields { line });
    if let Some(trace) = trace {
        let _ = write!(line, " trace_id={} span_id={}", trace.trace_id(), trace.span_id());
    }
    line.push('\n');
}

/// RFC 3339 in UTC, to the microsecond.
fn push_time(line: &mut String) {
    let _ = SystemTime.format_time(&mut Writer::new(line));
}

fn push_entry(line: &mut String, name: &str, value: &(impl Serialize + ?Sized)) {
    let Ok(value) = serde_json::to_string(value) else { return };
    let Ok(name) = serde_json::to_string(name) else { return };
    let _ = write!(line, ",{name}:{value}");
}

/// The names that a line has already; a field of such a name is written as `field.name`.
const TAKEN: [&str; 5] = ["timestamp", "level", "target", "trace_id", "span_id"];

struct JsonFields<'a> {
    line: &'a mut String,
    /// The target that a record of the `log` crate carries as a field.
    target: Option<String>,
}

impl JsonFields<'_> {
    fn push(&mut self, field: &Field, value: &(impl Serialize + ?Sized)) {
        let name = field.name();
        if TAKEN.contains(&name) {
            push_entry(self.line, &format!("field.{name}"), value);
        } else if !name.starts_with("log.") {
            push_entry(self.line, name, value);
        }
    }
}

impl Visit for JsonFields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            self.target = Some(value.to_owned());
        } else {
            self.push(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.push(field, &chain(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, &value);
    }
}

struct TextFields<'a> {
    line: &'a mut String,
}

impl Visit for TextFields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.line, " {value:?}"),
            name if name.starts_with("log.") => Ok(()),
            name => write!(self.line, " {name}={value:?}"),
        };
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let _ = write!(self.line, " {}={:?}", field.name(), chain(value));
    }
}

/// An error with its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
