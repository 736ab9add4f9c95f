//! Reading the GGUF container: metadata, and where each tensor lies.
//!
//! Everything is checked on opening: afterwards every tensor is known to lie in the file, aligned,
//! alone in its bytes, with a size that fits its type and shape.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::cursor::Cursor;
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, MAGIC, MAX_DIMS, VERSION, Value};
use crate::mapped::part;
use crate::{FormatError, Mapped, map_file};

/// Bytes of the smallest metadata entry: a key's length, a type, a one-byte value.
const MIN_ENTRY: usize = 8 + 4 + 1;
/// Bytes of the smallest tensor description: name's length, count of dimensions, type, offset.
const MIN_TENSOR: usize = 8 + 4 + 4 + 8;
/// Longest key or tensor name.
const MAX_NAME: usize = 1 << 16;

/// A tensor's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Type of the data.
    pub kind: GgmlType,
    /// Row-major shape; the file stores it reversed, fastest dimension first.
    pub shape: Vec<usize>,
    /// Where the data lies in the file.
    pub range: Range<usize>,
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: Mapped,
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorInfo>,
    /// Positions in `tensors`.
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Maps a file and checks its structure.
    ///
    /// # Errors
    /// [`FormatError::Malformed`] or [`FormatError::Tensor`] naming what is broken.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = map_file(path)?;
        let (metadata, tensors) = parse(path, &file)?;
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { path: path.to_owned(), file, metadata, tensors, by_name })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys and values in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// Whether this program wrote the file: others have no keys of our own.
    pub fn is_ours(&self) -> bool {
        self.metadata.iter().any(|(key, _)| key.starts_with("trine."))
    }

    /// Tensor descriptions in the file's order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The description of a tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&i| &self.tensors[i])
    }

    /// The data of a tensor of this file.
    ///
    /// # Panics
    /// When `info` is of another file and does not lie in this one.
    pub fn bytes(&self, info: &TensorInfo) -> &[u8] {
        &self.file[info.range.clone()]
    }

    /// Gives the memory of some bytes of a tensor back; they are read from the file again when asked for.
    pub(crate) fn release(&self, info: &TensorInfo, bytes: Range<usize>) {
        self.file.release(part(&info.range, bytes));
    }

    /// Gives the memory of the whole file back.
    pub(crate) fn release_all(&self) {
        self.file.release(0..self.file.len());
    }
}

/// What a file holds: metadata and tensor descriptions.
type Contents = (Vec<(String, Value)>, Vec<TensorInfo>);

fn parse(path: &Path, file: &[u8]) -> Result<Contents, FormatError> {
    let mut cursor = Cursor::new(path, file);
    let magic: [u8; 4] = cursor.bytes("magic")?;
    if magic != MAGIC {
        let found = magic.escape_ascii();
        return Err(FormatError::malformed(path, "magic", "GGUF", found));
    }
    let version = cursor.u32("version")?;
    if version != VERSION {
        let found = match version.swap_bytes() {
            VERSION => "a big-endian file".to_owned(),
            _ => version.to_string(),
        };
        return Err(FormatError::malformed(path, "version", VERSION, found));
    }
    let tensor_count = cursor.u64("tensor count")?;
    let entry_count = cursor.u64("metadata count")?;
    cursor.check(tensor_count, MIN_TENSOR, "tensor count")?;

    let mut seen = HashSet::new();
    let metadata = cursor.list(entry_count, MIN_ENTRY, "metadata count", |cursor| {
        let key = name(cursor, "metadata key")?;
        if !seen.insert(key.clone()) {
            return Err(FormatError::key(path, key, "one entry", "another"));
        }
        let id = cursor.u32(&key)?;
        let value = Value::decode(id, cursor, &key)?;
        Ok((key, value))
    })?;
    let alignment = alignment(path, &metadata)?;

    let raw = cursor.list(tensor_count, MIN_TENSOR, "tensor count", |c| describe(path, c))?;
    // With no tensors the file may end where their data would start.
    let data_start = cursor.position().next_multiple_of(alignment);
    let tensors: Vec<TensorInfo> = raw
        .into_iter()
        .map(|raw| place(path, raw, data_start, file.len(), alignment))
        .collect::<Result<_, _>>()?;
    check_disjoint(path, &tensors)?;
    Ok((metadata, tensors))
}

fn name(cursor: &mut Cursor<'_>, what: &str) -> Result<String, FormatError> {
    let name = cursor.string(what)?;
    if name.len() > MAX_NAME {
        return Err(cursor.refuse(what, format_args!("up to {MAX_NAME} bytes"), name.len()));
    }
    Ok(name)
}

fn alignment(path: &Path, metadata: &[(String, Value)]) -> Result<usize, FormatError> {
    let Some((_, value)) = metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let fits = |n: &u64| n.is_power_of_two() && (8..=1 << 16).contains(n);
    let alignment = value.as_u64().filter(fits).ok_or_else(|| {
        FormatError::key(
            path,
            ALIGNMENT_KEY,
            "a power of two from 8 to 65536",
            format!("{value:?}"),
        )
    })?;
    Ok(alignment as usize)
}

/// A tensor as the header describes it, before its place in the file is known to exist.
struct Raw {
    name: String,
    kind: GgmlType,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

fn describe(path: &Path, cursor: &mut Cursor<'_>) -> Result<Raw, FormatError> {
    let name = name(cursor, "tensor name")?;
    let refuse = |expected: &str, found: String| FormatError::tensor(path, &name, expected, found);
    let dims = cursor.u32(&name)?;
    if dims as usize > MAX_DIMS {
        return Err(refuse("up to 4 dimensions", dims.to_string()));
    }
    let mut shape = cursor.list(dims.into(), 8, &name, |cursor| {
        let dim = cursor.u64(&name)?;
        match usize::try_from(dim) {
            Ok(dim) if dim > 0 => Ok(dim),
            _ => Err(refuse("dimensions of at least 1 that fit in memory", dim.to_string())),
        }
    })?;
    shape.reverse();
    let id = cursor.u32(&name)?;
    let kind = GgmlType::from_id(id)
        .ok_or_else(|| refuse("a known tensor type", format!("type id {id}")))?;
    let offset = cursor.u64(&name)?;
    let bytes = kind.tensor_bytes(&shape).ok_or_else(|| {
        let (block, unit) = (kind.block().0, kind.unit());
        let expected = format!("whole blocks of {block} values in {unit} and a size in range");
        refuse(&expected, format!("{kind} of shape {shape:?}"))
    })?;
    Ok(Raw { name, kind, shape, offset, bytes })
}

fn place(
    path: &Path,
    raw: Raw,
    data_start: usize,
    file_len: usize,
    alignment: usize,
) -> Result<TensorInfo, FormatError> {
    let Raw { name, kind, shape, offset, bytes } = raw;
    if !offset.is_multiple_of(alignment as u64) {
        let expected = format_args!("an offset that is a multiple of {alignment}").to_string();
        return Err(FormatError::tensor(path, name, expected, format!("offset {offset}")));
    }
    let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
    let end = start.and_then(|start| start.checked_add(bytes)).filter(|&end| end <= file_len);
    let (Some(start), Some(end)) = (start, end) else {
        let expected = format!("{bytes} bytes at offset {offset}");
        let found = format!("{} bytes of data", file_len.saturating_sub(data_start));
        return Err(FormatError::tensor(path, name, expected, found));
    };
    Ok(TensorInfo { name, kind, shape, range: start..end })
}

/// Two names for the same bytes, or one name for two, are mistakes or attacks.
fn check_disjoint(path: &Path, tensors: &[TensorInfo]) -> Result<(), FormatError> {
    let mut names = HashSet::new();
    if let Some(twice) = tensors.iter().find(|t| !names.insert(&t.name)) {
        return Err(FormatError::tensor(path, &twice.name, "one tensor of a name", "another"));
    }
    let mut by_place: Vec<_> = tensors.iter().collect();
    by_place.sort_by_key(|t| t.range.start);
    for pair in by_place.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            let found = format!("an overlap with `{}`", pair[0].name);
            return Err(FormatError::tensor(path, &pair[1].name, "bytes of its own", found));
        }
    }
    Ok(())
}
