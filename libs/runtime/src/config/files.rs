//! Settings whose value is the content of a file, as orchestrators hand out secrets.

use std::{
    fs::File,
    io::{ErrorKind, Read as _},
    path::Path,
};

use super::ConfigError;

/// What the name of a variable ends with that gives the path of a file instead of the value itself.
pub const FILE_SUFFIX: &str = "_FILE";

/// Largest file that is read as a setting: more than any list of keys needs, and no device or log by mistake.
pub const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Reads the file that `variable` names: UTF-8, at most [`MAX_FILE_BYTES`]. One newline at its end is not part of the
/// value, because most editors and tools add one.
///
/// # Errors
/// When it cannot be read, is too large or is no text. The error names the variable and the path, never the content.
pub fn read_value(variable: &str, path: &Path) -> Result<String, ConfigError> {
    let shown = path.display();
    let wrong = |problem: String, fix: &str| Err(ConfigError::new(variable, problem, fix));
    if path.as_os_str().is_empty() {
        return wrong("is empty".to_owned(), "give the path of a file, or unset it");
    }
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        let fix = match error.kind() {
            ErrorKind::NotFound => "create the file, or name the one that holds the value",
            ErrorKind::PermissionDenied => "let the user of this process read it",
            _ => "name a plain file that holds the value",
        };
        return wrong(format!("names `{shown}`, which cannot be read ({error})"), fix);
    }
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let problem = format!("names `{shown}`, which holds more than {MAX_FILE_BYTES} bytes");
        return wrong(problem, "name a file that holds the value and nothing else");
    }
    match String::from_utf8(bytes) {
        Ok(mut text) => {
            if text.ends_with('\n') {
                text.pop();
                if text.ends_with('\r') {
                    text.pop();
                }
            }
            Ok(text)
        }
        Err(_) => {
            wrong(format!("names `{shown}`, which is not valid UTF-8"), "name a file that holds plain text")
        }
    }
}

/// The error about a value that was given twice.
#[must_use]
pub fn given_twice(variable: &str, file_variable: &str) -> ConfigError {
    ConfigError::new(variable, format!("is set, and so is `{file_variable}`"), "unset one of the two")
}
