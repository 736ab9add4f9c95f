//! Writing the GGUF container, one tensor at a time.
//!
//! All tensors are announced before the first is written, because the header holds their offsets.

use std::path::Path;

use super::value::encode_string;
use super::{ALIGNMENT, ALIGNMENT_KEY, GgmlType, MAGIC, VERSION, Value};
use crate::{AtomicFile, FormatError};

/// A tensor as the header announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name in the file.
    pub name: String,
    /// Type of the data.
    pub kind: GgmlType,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// A file in the making; it appears under its name on [`Writer::finish`].
#[derive(Debug)]
pub struct Writer {
    file: AtomicFile,
    /// Name and size of the tensors still to be written.
    pending: std::vec::IntoIter<(String, usize)>,
}

impl Writer {
    /// Writes the header. `general.alignment` is added to the metadata.
    ///
    /// # Errors
    /// A shape that does not fill whole blocks of its type, or an error of the file system.
    pub fn create(
        path: &Path,
        metadata: &[(String, Value)],
        tensors: &[TensorSpec],
    ) -> Result<Self, FormatError> {
        let mut header = Vec::new();
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64 + 1).to_le_bytes());
        let alignment = (ALIGNMENT_KEY.to_owned(), Value::U32(ALIGNMENT as u32));
        for (key, value) in metadata.iter().chain([&alignment]) {
            encode_string(key, &mut header);
            header.extend(value.type_id().to_le_bytes());
            value.encode(&mut header);
        }
        let mut pending = Vec::new();
        let mut offset = 0usize;
        for TensorSpec { name, kind, shape } in tensors {
            let bytes = kind.tensor_bytes(shape).ok_or_else(|| {
                let (block, unit) = (kind.block().0, kind.unit());
                let expected = format_args!("whole blocks of {block} values in {unit}");
                FormatError::tensor(path, name, expected, format_args!("{kind} {shape:?}"))
            })?;
            encode_string(name, &mut header);
            header.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|&dim| header.extend((dim as u64).to_le_bytes()));
            header.extend(kind.id().to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            pending.push((name.clone(), bytes));
            offset += bytes.next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        let mut file = AtomicFile::create(path)?;
        file.put(&header)?;
        Ok(Self { file, pending: pending.into_iter() })
    }

    /// Writes the data of the next announced tensor.
    ///
    /// # Errors
    /// Not the announced number of bytes, no tensor left to write, or a full disk.
    pub fn tensor(&mut self, data: &[u8]) -> Result<(), FormatError> {
        let (name, bytes) = self.pending.next().unwrap_or_default();
        if data.len() != bytes {
            let (expected, found) = (format!("{bytes} bytes"), format!("{} bytes", data.len()));
            return Err(FormatError::tensor(self.file.path(), name, expected, found));
        }
        self.file.put(data)?;
        let padding = bytes.next_multiple_of(ALIGNMENT) - bytes;
        self.file.put(&[0; ALIGNMENT][..padding])
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// A tensor that was announced but not written, or an error of the file system.
    pub fn finish(mut self) -> Result<(), FormatError> {
        if let Some((name, bytes)) = self.pending.next() {
            let expected = format!("{bytes} bytes");
            return Err(FormatError::tensor(self.file.path(), name, expected, "no data"));
        }
        self.file.commit()
    }
}
