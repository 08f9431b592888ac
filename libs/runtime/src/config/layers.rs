//! Merges the layers and explains what does not fit.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use figment::{
    Error, Figment, Metadata, Profile, Provider,
    error::{Actual, Kind},
    providers::{Format, Toml},
    value::{Dict, Map, Value},
};
use serde::de::DeserializeOwned;

use super::{FILE_SUFFIX, LoadError, PREFIX, SECTIONS, Validate, given_twice, read_value};

/// The layers above the defaults, which are those of the settings' own `Default`.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    file: Option<PathBuf>,
    variables: Vec<(String, String)>,
    flags: Vec<Text>,
}

/// A setting that was given as text, whose type is known only when it is read.
#[derive(Debug, Clone)]
struct Text {
    source: String,
    key: String,
    raw: String,
    value: Value,
    /// Whether it came from a file of its own, as secrets do: no error may show it.
    hidden: bool,
}

impl Text {
    fn new(source: String, key: String, raw: String, hidden: bool) -> Self {
        let mut value: Value = raw.parse().unwrap_or_else(|never| match never {});
        if hidden && matches!(value, Value::String(..)) {
            // Quotes and blanks around a text are taken off a variable; the content of a file is what it is.
            value = Value::from(raw.as_str());
        }
        Self { source, key, raw, value, hidden }
    }

    /// Reads the text anew after the setting said what it wants: a number may have been meant as text, and
    /// text as a list. Says whether that made a difference.
    fn adapt(&mut self, expected: &str) -> bool {
        let value = if expected.contains("string") {
            Value::from(self.raw.as_str())
        } else if expected == "a sequence" {
            let items = self.raw.split(',').map(str::trim).filter(|item| !item.is_empty());
            Value::from(items.collect::<Vec<_>>())
        } else {
            return false;
        };
        let differs = value != self.value;
        self.value = value;
        differs
    }
}

impl Layers {
    /// Defaults only.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the TOML file, which must exist.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        self.file = Some(path.into());
        self
    }

    /// Adds variables as if they were the environment; others than those of [`SECTIONS`] are ignored. What files they
    /// name is read when the settings are loaded.
    #[must_use]
    pub fn variables(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        self.variables.extend(variables);
        self
    }

    /// Adds the variables of this process.
    ///
    /// # Errors
    /// When the value of one that concerns us is not text.
    pub fn environment(mut self) -> Result<Self, LoadError> {
        for (name, value) in env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            if !concerns_us(&name) {
                continue;
            }
            match value.into_string() {
                Ok(value) => self.variables.push((name, value)),
                Err(_) => return Err(LoadError::NotUnicode(name)),
            }
        }
        Ok(self)
    }

    /// Adds a flag for the setting `key`, such as `--listen` for `edge.listen`, when it was given.
    #[must_use]
    pub fn flag(mut self, flag: &str, key: &str, value: Option<impl ToString>) -> Self {
        if let Some(value) = value {
            self.flags.push(Text::new(format!("flag `{flag}`"), key.to_owned(), value.to_string(), false));
        }
        self
    }

    /// Merges the layers into settings and validates them.
    ///
    /// # Errors
    /// [`LoadError`], with the first thing that is wrong.
    pub fn load<T: DeserializeOwned + Validate>(&self) -> Result<T, LoadError> {
        let file = self.read_file()?;
        let mut texts = self.read_variables()?;
        texts.extend(self.flags.iter().cloned());
        loop {
            let merged = merge(file.as_ref(), &texts);
            match merged.extract::<T>() {
                Ok(settings) => return check(settings, &merged),
                Err(error) => {
                    // Each round fixes the type of one text, so that there are at most two for each.
                    if !adapt(&mut texts, &error) {
                        return Err(explain(error, &merged, &texts));
                    }
                }
            }
        }
    }

    fn read_file(&self) -> Result<Option<Layer>, LoadError> {
        let Some(path) = &self.file else { return Ok(None) };
        let text = fs::read_to_string(path)
            .map_err(|source| LoadError::Unreadable { path: path.clone(), source })?;
        let settings = Toml::from_str(&text).map_err(|error| {
            // The library's own text would quote the line, which may hold a secret.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            LoadError::NotToml { path: path.clone(), line, problem: error.message().to_owned() }
        })?;
        Ok(Some(Layer { source: format!("file `{}`", path.display()), settings }))
    }

    fn read_variables(&self) -> Result<Vec<Text>, LoadError> {
        let mut texts: Vec<Text> = Vec::new();
        // Which variable gave a key, and whether by a file.
        let mut given: Vec<(&str, bool)> = Vec::new();
        for (name, value) in self.variables.iter().filter(|(name, _)| concerns_us(name)) {
            let (plain, by_file) = match name.strip_suffix(FILE_SUFFIX) {
                Some(plain) => (plain, true),
                None => (name.as_str(), false),
            };
            let key = plain[PREFIX.len()..].to_lowercase().replace("__", ".");
            let (section, rest) = key.split_once('.').unwrap_or_default();
            if !SECTIONS.contains(&section) || rest.split('.').any(str::is_empty) {
                return Err(LoadError::UnknownVariable(name.clone()));
            }
            let other =
                texts.iter().zip(&given).find(|(text, (_, file))| text.key == key && *file != by_file);
            if let Some((_, &(other, _))) = other {
                let (plain, file) = if by_file { (other, name.as_str()) } else { (name.as_str(), other) };
                return Err(given_twice(plain, file).into());
            }
            let value = if by_file { read_value(name, Path::new(value))? } else { value.clone() };
            given.push((name, by_file));
            texts.push(Text::new(format!("environment variable `{name}`"), key, value, by_file));
        }
        Ok(texts)
    }
}

fn concerns_us(variable: &str) -> bool {
    variable.strip_prefix(PREFIX).is_some_and(|rest| rest.contains("__"))
}

/// One layer as the library wants it: its name is what errors show.
struct Layer {
    source: String,
    settings: Dict,
}

impl Provider for &Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.source.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, Error> {
        Ok(Profile::Default.collect(self.settings.clone()))
    }
}

fn merge(file: Option<&Layer>, texts: &[Text]) -> Figment {
    let mut merged = Figment::new();
    if let Some(file) = file {
        merged = merged.merge(file);
    }
    for text in texts {
        let nested = figment::util::nest(&text.key, text.value.clone());
        let settings = nested.into_dict().unwrap_or_default();
        merged = merged.merge(&Layer { source: text.source.clone(), settings });
    }
    merged
}

fn adapt(texts: &mut [Text], error: &Error) -> bool {
    let Kind::InvalidType(_, expected) = &error.kind else { return false };
    let key = error.path.join(".");
    // The last one is the one that counts.
    texts.iter_mut().rfind(|text| text.key == key).is_some_and(|text| text.adapt(expected))
}

fn check<T: Validate>(settings: T, merged: &Figment) -> Result<T, LoadError> {
    match settings.validate() {
        Ok(()) => Ok(settings),
        Err(error) => {
            let source_name = source_of(merged, &error.key);
            Err(LoadError::Invalid { error, source_name })
        }
    }
}

fn source_of(merged: &Figment, key: &str) -> String {
    // The library finds no items of lists: a list comes from one layer as a whole.
    let key = key.split('[').next().unwrap_or_default();
    let parts: Vec<_> = key.split('.').take_while(|part| part.parse::<usize>().is_err()).collect();
    merged
        .find_metadata(&parts.join("."))
        .map_or_else(|| "the default".to_owned(), |metadata| metadata.name.to_string())
}

fn explain(error: Error, merged: &Figment, texts: &[Text]) -> LoadError {
    let mut path = error.path;
    // The setting, or the list or table that it is in.
    let key = path.join(".");
    let is_here = |text: &&Text| key.starts_with(&text.key);
    let hidden = texts.iter().rfind(is_here).is_some_and(|text| text.hidden);
    let problem = match error.kind {
        Kind::UnknownField(name, expected) => {
            if path.last() != Some(&name) {
                path.push(name);
            }
            let key = path.join(".");
            let expected = expected.iter().map(|name| (*name).to_owned()).collect();
            return LoadError::UnknownKey { source_name: source_of(merged, &key), key, expected };
        }
        Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
            let found = if hidden { "something else".to_owned() } else { describe(&found, &expected) };
            format!("found {found}, expected {}", in_plain_words(&expected))
        }
        Kind::UnknownVariant(_, expected) if hidden => {
            format!("found something else, expected one of {}", expected.join(", "))
        }
        Kind::UnknownVariant(found, expected) => {
            format!("found `{found}`, expected one of {}", expected.join(", "))
        }
        Kind::MissingField(name) => format!("`{name}` is missing; add it"),
        Kind::InvalidLength(length, expected) => format!("found {length} items, expected {expected}"),
        _ if hidden => "the content of the file does not fit the setting".to_owned(),
        other => other.to_string(),
    };
    LoadError::WrongValue { source_name: source_of(merged, &key), key, problem }
}

fn describe(found: &Actual, expected: &str) -> String {
    match found {
        Actual::Unsigned(number) => format!("the number {number}"),
        Actual::Signed(number) => format!("the number {number}"),
        Actual::Float(number) => format!("the number {number}"),
        Actual::Bool(value) => value.to_string(),
        // A plain key may stand where the list of keys belongs, and must not reach a log.
        Actual::Str(_) if expected == "a sequence" || expected.starts_with("struct ") => "text".to_owned(),
        Actual::Str(text) => format!("the text {text:?}"),
        Actual::Seq => "a list".to_owned(),
        Actual::Map => "a table".to_owned(),
        other => other.to_string(),
    }
}

/// The library names Rust types.
fn in_plain_words(expected: &str) -> String {
    match expected {
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number, not below 0 and not too large",
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list, such as [\"a\", \"b\"]",
        "a string" => "text in quotes",
        other if other.starts_with("struct ") => "a section with keys of its own",
        other => other,
    }
    .to_owned()
}
