//! The header of a safetensors file.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::FormatError;

/// Bytes before a safetensors header: its length.
const LENGTH_BYTES: usize = 8;

/// The start of the data and the checked header of a safetensors file.
///
/// `Metadata` checks on its own that the tensors cover their data without holes and overlaps and
/// that sizes fit shapes. The whole file is measured here, because the library's own reader adds up
/// these hostile numbers unchecked.
pub(crate) fn header(path: &Path, file: &[u8]) -> Result<(usize, Metadata), FormatError> {
    let refuse =
        |what, expected: &str, found: String| FormatError::malformed(path, what, expected, found);
    let size = || format!("{} bytes in all", file.len());
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(refuse("safetensors header length", "8 bytes", size()));
    };
    let length = usize::try_from(u64::from_le_bytes(*length)).unwrap_or(usize::MAX);
    let Some(text) = rest.get(..length) else {
        let expected = format!("{length} bytes");
        return Err(refuse("safetensors header", &expected, size()));
    };
    let bad = |e: serde_json::Error| refuse("safetensors header", "valid tensors", e.to_string());
    serde_json::from_slice::<OneOfAName>(text).map_err(bad)?;
    let metadata: Metadata = serde_json::from_slice(text).map_err(bad)?;
    let data = rest.len() - length;
    if metadata.data_len() != data {
        let expected = format!("{} bytes", metadata.data_len());
        return Err(refuse("tensor data", &expected, format!("{data} bytes")));
    }
    Ok((LENGTH_BYTES + length, metadata))
}

/// A header without two tensors of a name, of which [`Metadata`] would take the second in silence.
struct OneOfAName;

impl<'de> Deserialize<'de> for OneOfAName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Self)
    }
}

impl<'de> Visitor<'de> for OneOfAName {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self, A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            map.next_value::<IgnoredAny>()?;
            if let Some(twice) = names.replace(name) {
                return Err(A::Error::custom(format_args!("two tensors of the name `{twice}`")));
            }
        }
        Ok(self)
    }
}
