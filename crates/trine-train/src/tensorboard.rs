//! TensorBoard event files, a translation of `metrics.jsonl`.
//!
//! A file is a sequence of records (TFRecord): length, masked CRC-32C of the length, data, masked
//! CRC-32C of the data, integers little-endian. The data is an `Event` of TensorFlow's `event.proto`
//! and `summary.proto`, of which only the few fields below are written, so the wire format of
//! protocol buffers is written by hand.
//!
//! Every start of a run is a file of its own. Its first event names the format, the second says with
//! which step the run goes on: TensorBoard forgets that step and later ones of earlier files, which
//! are those that a killed run made after its last checkpoint.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::TrainError;

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a file in `dir`, which is made; the next step to be logged is `next_step`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn create(dir: &Path, next_step: usize) -> Result<Self, TrainError> {
        let failed = |path: &Path, source| TrainError::Write { path: path.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(|e| failed(dir, e))?;
        // Read in the order of their names, which is that of their numbers within a second.
        let seconds = now() as u64;
        let mut number = 0;
        let (path, file) = loop {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.trine.{number:03}"));
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
                Err(e) => return Err(failed(&path, e)),
            }
        };
        let mut writer = Self { path, file };
        writer.put(&event(0, |out| bytes_field(out, 3, b"brain.Event:2")))?;
        let start = |out: &mut Vec<u8>| message(out, 7, |session| varint_field(session, 1, 1));
        writer.put(&event(next_step as u64, start))?;
        Ok(writer)
    }

    /// Writes what a line of `metrics.jsonl` says: numbers as scalars, diagnostics as a scalar for
    /// each measure of each projection, samples as text. A line without a step is passed over.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn log(&mut self, line: &Value) -> Result<(), TrainError> {
        let (Some(step), Some(fields)) = (line["step"].as_u64(), line.as_object()) else {
            return Ok(());
        };
        let mut values = Vec::new();
        for (key, value) in fields.iter().filter(|(key, _)| *key != "step") {
            match (key.as_str(), value) {
                ("diagnostics", value) => diagnostics(&mut values, value),
                ("samples", Value::Array(samples)) => {
                    for (i, sample) in samples.iter().enumerate() {
                        let part = |key| sample[key].as_str().unwrap_or_default();
                        let shown = format!("**{}**{}", part("prompt"), part("text"));
                        text(&mut values, &format!("samples/{i}"), &shown);
                    }
                }
                (key, Value::Number(number)) => {
                    scalar(&mut values, tag(key), number.as_f64().unwrap_or(f64::NAN));
                }
                (key, Value::String(said)) => text(&mut values, key, said),
                _ => {}
            }
        }
        if values.is_empty() {
            return Ok(());
        }
        self.put(&event(step, |out| bytes_field(out, 5, &values)))
    }

    fn put(&mut self, data: &[u8]) -> Result<(), TrainError> {
        let written = self.file.write_all(&record(data));
        written.map_err(|source| TrainError::Write { path: self.path.clone(), source })
    }
}

/// TensorBoard shows tags with the same beginning together.
fn tag(key: &str) -> &str {
    match key {
        "loss" => "loss/train",
        "val_loss" => "loss/validation",
        "learning_rate" => "optimizer/learning_rate",
        "grad_norm" => "optimizer/grad_norm",
        "tokens" => "speed/tokens",
        "tokens_per_second" => "speed/tokens_per_second",
        other => other,
    }
}

fn diagnostics(values: &mut Vec<u8>, found: &Value) {
    let layers = found["layers"].as_object().into_iter().flatten();
    let named = layers.map(|(name, layer)| (name.as_str(), layer));
    for (name, layer) in std::iter::once(("all", &found["all"])).chain(named) {
        for (measure, value) in layer.as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64() {
                scalar(values, &format!("{measure}/{name}"), value);
            }
        }
    }
}

/// Appends a `Summary.Value` with a number.
fn scalar(values: &mut Vec<u8>, tag: &str, number: f64) {
    message(values, 1, |value| {
        bytes_field(value, 1, tag.as_bytes());
        key(value, 2, FIXED32);
        value.extend_from_slice(&(number as f32).to_le_bytes());
    });
}

/// Appends a `Summary.Value` with a text, as the text plugin reads it: a tensor of one string.
fn text(values: &mut Vec<u8>, tag: &str, text: &str) {
    const DT_STRING: u64 = 7;
    const DATA_CLASS_TENSOR: u64 = 2;
    message(values, 1, |value| {
        bytes_field(value, 1, tag.as_bytes());
        message(value, 8, |tensor| {
            varint_field(tensor, 1, DT_STRING);
            message(tensor, 2, |shape| message(shape, 2, |dim| varint_field(dim, 1, 1)));
            bytes_field(tensor, 8, text.as_bytes());
        });
        message(value, 9, |metadata| {
            message(metadata, 1, |plugin| bytes_field(plugin, 1, b"text"));
            varint_field(metadata, 4, DATA_CLASS_TENSOR);
        });
    });
}

/// An `Event` of now.
fn event(step: u64, what: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    key(&mut out, 1, FIXED64);
    out.extend_from_slice(&now().to_le_bytes());
    varint_field(&mut out, 2, step);
    what(&mut out);
    out
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

// Wire types of protocol buffers.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

fn key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(out, field << 3 | wire_type);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint_field(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, VARINT);
    varint(out, value);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(out, field, BYTES);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn message(out: &mut Vec<u8>, field: u64, fill: impl FnOnce(&mut Vec<u8>)) {
    let mut inner = Vec::new();
    fill(&mut inner);
    bytes_field(out, field, &inner);
}

/// One record of a TFRecord file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
    out
}

/// TFRecord stores checksums rotated and shifted, so that those of data with checksums inside are
/// no special case.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let (mut table, mut i) = ([0; 256], 0);
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |crc, byte| TABLE[((crc ^ u32::from(*byte)) & 255) as usize] ^ crc >> 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn checksums_are_those_of_rfc_3720() {
        let vectors: [(&[u8], u32); 4] = [
            (b"123456789", 0xe306_9283),
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (b"", 0),
        ];
        for (bytes, crc) in vectors {
            assert_eq!(crc32c(bytes), crc, "{bytes:?}");
        }
        // The unmasking of TensorFlow's crc32c.h gives it back.
        let unmasked = masked(0xe306_9283).wrapping_sub(0xa282_ead8).rotate_right(17);
        assert_eq!(unmasked, 0xe306_9283);
    }

    /// Splits a file into records and checks both checksums of each.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let mut found = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            assert_eq!(word(&file[8..12]), masked(crc32c(&file[..8])));
            let data = &file[12..][..length];
            assert_eq!(word(&file[12 + length..][..4]), masked(crc32c(data)));
            found.push(data.to_vec());
            file = &file[16 + length..];
        }
        found
    }

    /// A field of a message: its number, and its bytes or its integer as eight of them.
    fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>)> {
        fn varint(data: &mut &[u8]) -> u64 {
            let (mut value, mut shift) = (0, 0);
            loop {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 127) << shift;
                shift += 7;
                if byte < 128 {
                    return value;
                }
            }
        }
        let mut found = Vec::new();
        while !data.is_empty() {
            let key = varint(&mut data);
            let length = match key & 7 {
                VARINT => {
                    found.push((key >> 3, varint(&mut data).to_le_bytes().to_vec()));
                    continue;
                }
                FIXED64 => 8,
                FIXED32 => 4,
                _ => varint(&mut data) as usize,
            };
            found.push((key >> 3, data[..length].to_vec()));
            data = &data[length..];
        }
        found
    }

    fn field(data: &[u8], number: u64) -> Vec<u8> {
        fields(data).into_iter().find(|(n, _)| *n == number).unwrap().1
    }

    #[test]
    fn event_files_hold_what_the_metrics_say() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(dir.path(), 301).unwrap();
        writer.log(&json!({ "step": 301, "loss": 1.5, "tokens": 5, "odd": null })).unwrap();
        writer.log(&json!({ "no": "step" })).unwrap();
        let layers = json!({ "all": { "zero": 0.25 }, "layers": { "q": { "zero": 0.5 } } });
        writer.log(&json!({ "step": 302, "diagnostics": layers })).unwrap();
        writer.log(&json!({ "step": 303, "samples": [{ "prompt": "a", "text": "b" }] })).unwrap();
        let records = records(&std::fs::read(&writer.path).unwrap());
        let steps: Vec<_> = records.iter().map(|r| field(r, 2)[..2].to_vec()).collect();
        assert_eq!(steps, [vec![0, 0], vec![45, 1], vec![45, 1], vec![46, 1], vec![47, 1]]);
        assert_eq!(field(&records[0], 3), b"brain.Event:2");
        assert_eq!(field(&field(&records[1], 7), 1)[0], 1);
        let values = |record: &[u8]| -> Vec<(String, f32)> {
            let scalar = |(_, value): (u64, Vec<u8>)| {
                let number = f32::from_le_bytes(field(&value, 2).try_into().unwrap());
                (String::from_utf8(field(&value, 1)).unwrap(), number)
            };
            fields(&field(record, 5)).into_iter().map(scalar).collect()
        };
        let expected = [("loss/train".to_owned(), 1.5), ("speed/tokens".to_owned(), 5.0)];
        assert_eq!(values(&records[2]), expected);
        let expected = [("zero/all".to_owned(), 0.25), ("zero/q".to_owned(), 0.5)];
        assert_eq!(values(&records[3]), expected);
        let text = field(&field(&records[4], 5), 1);
        assert_eq!(field(&field(&text, 8), 8), b"**a**b");
        assert_eq!(field(&field(&field(&text, 9), 1), 1), b"text");
    }

    #[test]
    fn a_run_that_is_taken_up_begins_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventWriter::create(dir.path(), 1).unwrap();
        let second = EventWriter::create(dir.path(), 1).unwrap();
        assert!(first.path < second.path, "{first:?} {second:?}");
    }
}
