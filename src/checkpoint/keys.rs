//! The keys of an object of a JSON file, each read as what it has to be, or an error that names it.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// The keys of an object of a file.
pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) object: &'a Map<String, Value>,
}

impl Keys<'_> {
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.object.get(key)
    }

    pub(super) fn error(&self, key: &str, expected: &str) -> Error {
        let message = match self.object.get(key) {
            Some(found) => format!("{key}: expected {expected}, found {found}"),
            None => format!("{key}: expected {expected}, found no such key"),
        };
        Error::format(self.path, message)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.object.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    pub(super) fn count(&self, key: &str) -> Result<usize> {
        let value = self.object.get(key).and_then(Value::as_u64);
        value
            .and_then(|value| value.try_into().ok())
            .ok_or_else(|| self.error(key, "a whole number"))
    }

    /// A number from 1 on.
    pub(super) fn at_least_one(&self, key: &str) -> Result<usize> {
        match self.count(key)? {
            0 => Err(self.error(key, "a number from 1 on")),
            count => Ok(count),
        }
    }

    /// A number that has to be there.
    pub(super) fn number(&self, key: &str) -> Result<f32> {
        if self.object.get(key).is_none() {
            return Err(self.error(key, "a number"));
        }
        self.float(key, 0.0)
    }

    pub(super) fn float(&self, key: &str, default: f32) -> Result<f32> {
        match self.object.get(key) {
            None => Ok(default),
            // From its decimals straight to f32: by way of f64 it would be rounded twice.
            Some(Value::Number(number)) => {
                number.to_string().parse().map_err(|_| self.error(key, "a number"))
            }
            Some(_) => Err(self.error(key, "a number")),
        }
    }
}

/// The shortest decimal that gives this f32, so 1e-5 and not 9.999999747378752e-6.
pub(super) fn exact(value: f32) -> Value {
    json!(value.to_string().parse::<f64>().ok())
}

/// The keys of an object.
pub(super) fn object_of(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}
