//! A secret of a client command, given as it is or as a file that holds it.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
};

use sanjay_runtime::{ConfigError, config};

/// How a secret can be given. Its value may come from the flag or the variable; each has a twin that names a file.
pub(crate) struct Given {
    /// Takes the value, such as `--api-key`.
    pub(crate) flag: &'static str,
    /// Holds the value.
    pub(crate) variable: &'static str,
    /// Holds the path of a file.
    file_variable: &'static str,
}

/// A back end's key.
pub(crate) const API_KEY: Given =
    Given { flag: "--api-key", variable: "SANJAY_API_KEY", file_variable: "SANJAY_API_KEY_FILE" };

/// A client's token.
pub(crate) const TOKEN: Given =
    Given { flag: "--token", variable: "SANJAY_TOKEN", file_variable: "SANJAY_TOKEN_FILE" };

/// What tokens are signed with.
pub(crate) const TOKEN_SECRET: Given = Given {
    flag: "--token-secret",
    variable: "SANJAY_EDGE__TOKEN_SECRET",
    file_variable: "SANJAY_EDGE__TOKEN_SECRET_FILE",
};

impl Given {
    /// What was given, as it is or in a file; a flag comes before a variable.
    ///
    /// # Errors
    /// When both were given in the same way, or the file cannot be used.
    pub(crate) fn of(
        &self,
        value: Option<String>,
        file: Option<PathBuf>,
    ) -> Result<Option<String>, ConfigError> {
        let value_by_flag = value.as_deref().is_some_and(|value| !is_set_to(self.variable, value.as_ref()));
        let file_by_flag =
            file.as_deref().is_some_and(|path| !is_set_to(self.file_variable, path.as_os_str()));
        self.choose(value, file.as_deref(), value_by_flag, file_by_flag)
    }

    fn choose(
        &self,
        value: Option<String>,
        file: Option<&Path>,
        value_by_flag: bool,
        file_by_flag: bool,
    ) -> Result<Option<String>, ConfigError> {
        match (value, file) {
            (None, None) => Ok(None),
            (Some(value), None) => Ok(Some(value)),
            (Some(value), Some(_)) if value_by_flag && !file_by_flag => Ok(Some(value)),
            (Some(_), Some(_)) if value_by_flag && file_by_flag => {
                let problem = format!("is given, and so is `{}-file`", self.flag);
                Err(ConfigError::new(self.flag, problem, "give one of the two"))
            }
            (Some(_), Some(_)) if !value_by_flag && !file_by_flag => {
                Err(config::given_twice(self.variable, self.file_variable))
            }
            (_, Some(path)) if file_by_flag => {
                config::read_value(&format!("{}-file", self.flag), path).map(Some)
            }
            (_, Some(path)) => config::read_value(self.file_variable, path).map(Some),
        }
    }
}

/// Whether a variable has this value: what the command line did not say itself comes from there.
fn is_set_to(variable: &str, value: &OsStr) -> bool {
    env::var_os(variable).is_some_and(|set| set == value)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_flag_comes_before_a_variable_and_both_ways_at_once_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "from-file\n").unwrap();
        let choose = |value: Option<&str>, file: bool, value_by_flag, file_by_flag| {
            let file = file.then_some(path.as_path());
            API_KEY.choose(value.map(str::to_owned), file, value_by_flag, file_by_flag)
        };
        assert_eq!(choose(None, false, false, false), Ok(None));
        assert_eq!(choose(Some("k"), false, false, false), Ok(Some("k".to_owned())));
        assert_eq!(choose(None, true, false, false), Ok(Some("from-file".to_owned())));
        assert_eq!(choose(Some("k"), true, true, false), Ok(Some("k".to_owned())));
        assert_eq!(choose(Some("k"), true, false, true), Ok(Some("from-file".to_owned())));
        let both = choose(Some("k"), true, false, false).unwrap_err().to_string();
        assert_eq!(both, "`SANJAY_API_KEY` is set, and so is `SANJAY_API_KEY_FILE`; unset one of the two");
        let both = choose(Some("k"), true, true, true).unwrap_err().to_string();
        assert_eq!(both, "`--api-key` is given, and so is `--api-key-file`; give one of the two");
        fs::remove_file(&path).unwrap();
        let gone = choose(None, true, false, false).unwrap_err().to_string();
        assert!(gone.starts_with("`SANJAY_API_KEY_FILE` names `"), "{gone}");
    }
}
