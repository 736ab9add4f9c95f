//! Metadata values: thirteen types, arrays among them.
//!
//! An array is held as a vector of its element type, so that a file cannot make the reader
//! allocate many times its own size.

use super::cursor::Cursor;
use crate::FormatError;

/// Levels of arrays in arrays that are followed; real files have one.
const MAX_NESTING: usize = 4;

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Numbers differ only in their type and id, so one list makes all that concerns them.
macro_rules! numbers {
    ($($name:ident($type:ty) = $id:literal,)*) => {
        /// A metadata value.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Value {
            $($name($type),)*
            Bool(bool),
            String(String),
            Array(Array),
        }

        /// An array of one type.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)]
        pub enum Array {
            $($name(Vec<$type>),)*
            Bool(Vec<bool>),
            String(Vec<String>),
            Array(Vec<Array>),
        }

        $(impl From<$type> for Value {
            fn from(v: $type) -> Self {
                Self::$name(v)
            }
        })*

        impl Value {
            /// The type's id in a file.
            pub fn type_id(&self) -> u32 {
                match self {
                    $(Self::$name(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::String(_) => STRING,
                    Self::Array(_) => ARRAY,
                }
            }

            /// Appends the value as it lies in a file, without its type.
            pub(super) fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$name(v) => out.extend(v.to_le_bytes()),)*
                    Self::Bool(v) => out.push(u8::from(*v)),
                    Self::String(v) => encode_string(v, out),
                    Self::Array(v) => v.encode(out),
                }
            }

            /// Reads a value of the type `id`.
            pub(super) fn decode(
                id: u32, cursor: &mut Cursor<'_>, key: &str,
            ) -> Result<Self, FormatError> {
                Ok(match id {
                    $($id => Self::$name(<$type>::from_le_bytes(cursor.bytes(key)?)),)*
                    BOOL => Self::Bool(decode_bool(cursor, key)?),
                    STRING => Self::String(cursor.string(key)?),
                    ARRAY => Self::Array(Array::decode(cursor, key, 0)?),
                    other => return Err(cursor.refuse(key, "a value type of 0 to 12", other)),
                })
            }
        }

        impl Array {
            /// Number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$name(v) => v.len(),)*
                    Self::Bool(v) => v.len(),
                    Self::String(v) => v.len(),
                    Self::Array(v) => v.len(),
                }
            }

            fn encode(&self, out: &mut Vec<u8>) {
                let id: u32 = match self {
                    $(Self::$name(_) => $id,)*
                    Self::Bool(_) => BOOL,
                    Self::String(_) => STRING,
                    Self::Array(_) => ARRAY,
                };
                out.extend(id.to_le_bytes());
                out.extend((self.len() as u64).to_le_bytes());
                match self {
                    $(Self::$name(v) => v.iter().for_each(|v| out.extend(v.to_le_bytes())),)*
                    Self::Bool(v) => out.extend(v.iter().map(|&v| u8::from(v))),
                    Self::String(v) => v.iter().for_each(|v| encode_string(v, out)),
                    Self::Array(v) => v.iter().for_each(|v| v.encode(out)),
                }
            }

            fn decode(
                cursor: &mut Cursor<'_>, key: &str, depth: usize,
            ) -> Result<Self, FormatError> {
                if depth >= MAX_NESTING {
                    return Err(cursor.refuse(key, "few nested arrays", "too many"));
                }
                let id = cursor.u32(key)?;
                let len = cursor.u64(key)?;
                Ok(match id {
                    $($id => {
                        let bytes = cursor.run(len, size_of::<$type>(), key)?;
                        let number = |b: &[u8; size_of::<$type>()]| <$type>::from_le_bytes(*b);
                        Self::$name(bytes.as_chunks().0.iter().map(number).collect())
                    })*
                    BOOL => Self::Bool(cursor.list(len, 1, key, |c| decode_bool(c, key))?),
                    STRING => Self::String(cursor.list(len, 8, key, |c| c.string(key))?),
                    ARRAY => Self::Array(
                        cursor.list(len, 12, key, |c| Self::decode(c, key, depth + 1))?,
                    ),
                    other => return Err(cursor.refuse(key, "an array type of 0 to 12", other)),
                })
            }
        }
    };
}

numbers! {
    U8(u8) = 0,
    I8(i8) = 1,
    U16(u16) = 2,
    I16(i16) = 3,
    U32(u32) = 4,
    I32(i32) = 5,
    F32(f32) = 6,
    U64(u64) = 10,
    I64(i64) = 11,
    F64(f64) = 12,
}

fn decode_bool(cursor: &mut Cursor<'_>, key: &str) -> Result<bool, FormatError> {
    match cursor.bytes(key)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(cursor.refuse(key, "a boolean of 0 or 1", other)),
    }
}

pub(super) fn encode_string(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<bool> for Value {
    fn from(v: bool) -> Self {
        Self::Bool(v)
    }
}

impl From<&str> for Value {
    fn from(v: &str) -> Self {
        Self::String(v.to_owned())
    }
}

impl Value {
    /// The value as a non-negative integer, of whatever integer type it is stored as.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::U64(v) => Some(v),
            Self::I8(v) => v.try_into().ok(),
            Self::I16(v) => v.try_into().ok(),
            Self::I32(v) => v.try_into().ok(),
            Self::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// The value as a float.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Self::F32(v) => Some(v),
            Self::F64(v) => Some(v as f32),
            _ => None,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(v) = self { Some(v) } else { None }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(v) = *self { Some(v) } else { None }
    }
}

/// A value for a message, cut where a hostile file would fill the screen.
pub(super) fn brief(value: &Value) -> String {
    match value {
        Value::Array(array) => format!("an array of {}", array.len()),
        Value::String(text) => format!("`{}`", text.chars().take(80).collect::<String>()),
        other => format!("{other:?}"),
    }
}
