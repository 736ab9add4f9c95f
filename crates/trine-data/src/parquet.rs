//! Parquet files: the rows of one column, a few at a time, or all rows as records.

use std::path::Path;

use serde_json::{Map, Value};

use crate::DataError;

#[cfg(feature = "parquet")]
pub(crate) use with_feature::rows;

/// All rows of a parquet file, each an object of its columns; what is nested stays so. Bytes are texts
/// where they are UTF-8; dates and decimals are texts too.
///
/// # Errors
/// A file that cannot be read or is damaged; bytes that are not UTF-8; [`DataError::Feature`] where the
/// build lacks the feature `parquet`.
pub fn parquet_records(path: &Path) -> Result<Vec<Map<String, Value>>, DataError> {
    #[cfg(feature = "parquet")]
    return with_feature::records(path);
    #[cfg(not(feature = "parquet"))]
    Err(DataError::Feature { path: path.to_owned(), feature: "parquet" })
}

#[cfg(not(feature = "parquet"))]
pub(crate) fn rows<'a>(
    path: &'a Path,
    _column: &str,
) -> Result<crate::corpus::Documents<'a>, DataError> {
    Err(DataError::Feature { path: path.to_owned(), feature: "parquet" })
}

#[cfg(feature = "parquet")]
mod with_feature {
    use std::fs::File;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    use ::parquet::column::reader::{ColumnReader, ColumnReaderImpl};
    use ::parquet::data_type::{ByteArray, ByteArrayType};
    use ::parquet::errors::Result as ParquetResult;
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use ::parquet::record::{Field, Row};
    use ::parquet::schema::types::ColumnDescriptor;
    use serde_json::{Map, Value};

    use crate::DataError;
    use crate::corpus::{Documents, LONGEST, io};

    /// Rows decoded together; their page is in memory anyway.
    const ROWS: usize = 256;

    /// The texts of a column, named with dots where it is nested.
    pub(crate) fn rows<'a>(path: &'a Path, column: &str) -> Result<Documents<'a>, DataError> {
        let file = File::open(path).map_err(io(path, "read"))?;
        let file = guarded(path, || SerializedFileReader::new(file))?;
        let schema = file.metadata().file_metadata().schema_descr();
        let index = schema.columns().iter().position(|c| c.path().string() == column);
        let index = index.filter(|&index| holds_one_value(&schema.column(index)));
        let Some(index) = index else {
            let names = schema.columns().iter().filter(|c| holds_one_value(c));
            let names: Vec<String> = names.map(|c| c.path().string()).collect();
            let cause = format!("no column `{column}` of texts, there are: {}", names.join(", "));
            return Err(DataError::Parquet { path: path.to_owned(), cause });
        };
        let reader = Rows { path, file, index, group: 0, column: None, row: 0 };
        Ok(Box::new(reader.flatten()))
    }

    /// What [`parquet_records`](super::parquet_records) does.
    pub(super) fn records(path: &Path) -> Result<Vec<Map<String, Value>>, DataError> {
        let file = File::open(path).map_err(io(path, "read"))?;
        let file = guarded(path, || SerializedFileReader::new(file))?;
        let mut rows = guarded(path, || file.get_row_iter(None))?;
        let mut records = Vec::new();
        while let Some(row) = guarded(path, || rows.next().transpose())? {
            let record = record(&row).map_err(|cause| {
                let (path, row) = (path.to_owned(), records.len() + 1);
                DataError::Row { path, row, cause }
            });
            records.push(record?);
        }
        Ok(records)
    }

    fn record(row: &Row) -> Result<Map<String, Value>, String> {
        let columns = row.get_column_iter();
        columns
            .map(|(name, field)| match value(field) {
                Ok(value) => Ok((name.clone(), value)),
                Err(cause) => Err(format!("column `{name}`: {cause}")),
            })
            .collect()
    }

    fn value(field: &Field) -> Result<Value, String> {
        Ok(match field {
            Field::Null => Value::Null,
            Field::Bool(value) => (*value).into(),
            Field::Byte(value) => (*value).into(),
            Field::Short(value) => (*value).into(),
            Field::Int(value) => (*value).into(),
            Field::Long(value) => (*value).into(),
            Field::UByte(value) => (*value).into(),
            Field::UShort(value) => (*value).into(),
            Field::UInt(value) => (*value).into(),
            Field::ULong(value) => (*value).into(),
            Field::Float16(value) => value.to_f32().into(),
            Field::Float(value) => (*value).into(),
            Field::Double(value) => (*value).into(),
            Field::Str(value) => value.clone().into(),
            Field::Bytes(value) => {
                let text = value.as_utf8().map_err(|_| "bytes that are not UTF-8".to_owned())?;
                text.into()
            }
            Field::Group(row) => Value::Object(record(row)?),
            Field::ListInternal(list) => {
                Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
            }
            other => other.to_string().into(),
        })
    }

    /// Whether it has bytes, and one value a row: a list has several.
    fn holds_one_value(column: &ColumnDescriptor) -> bool {
        column.physical_type() == ::parquet::basic::Type::BYTE_ARRAY && column.max_rep_level() == 0
    }

    /// Calls the library, which may panic on a damaged file; its message is on standard error then.
    fn guarded<T>(path: &Path, call: impl FnOnce() -> ParquetResult<T>) -> Result<T, DataError> {
        let refuse = |cause| DataError::Parquet { path: path.to_owned(), cause };
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(result) => result.map_err(|e| refuse(e.to_string())),
            Err(_) => Err(refuse("the parquet library panicked: the file is damaged".to_owned())),
        }
    }

    struct Rows<'a> {
        path: &'a Path,
        file: SerializedFileReader<File>,
        /// Of the column.
        index: usize,
        /// The row group that is opened next.
        group: usize,
        /// The column in the row group that is read now, with its levels of a value that is there.
        column: Option<(ColumnReaderImpl<ByteArrayType>, i16)>,
        /// Rows read.
        row: usize,
    }

    impl Rows<'_> {
        /// The next rows that lie together; `None` at the end.
        fn read(&mut self) -> Result<Option<Vec<Result<String, DataError>>>, DataError> {
            loop {
                let Some((column, present)) = &mut self.column else {
                    if self.group == self.file.num_row_groups() {
                        return Ok(None);
                    }
                    self.column = Some(self.next_group()?);
                    continue;
                };
                let (mut values, mut levels) = (Vec::new(), Vec::new());
                let read = guarded(self.path, || {
                    column.read_records(ROWS, Some(&mut levels), None, &mut values)
                });
                let (rows, ..) = read?;
                if rows == 0 {
                    self.column = None;
                    continue;
                }
                let missing = levels.iter().position(|level| *level < *present);
                // What stands before a missing value is given out first.
                values.truncate(missing.unwrap_or(rows));
                let mut texts: Vec<_> = (self.row + 1..)
                    .zip(&values)
                    .map(|(row, value)| self.text(row, value))
                    .collect();
                if missing.is_some() {
                    texts.push(Err(self.refuse(self.row + values.len() + 1, "there is no text")));
                }
                self.row += rows;
                return Ok(Some(texts));
            }
        }

        fn next_group(&mut self) -> Result<(ColumnReaderImpl<ByteArrayType>, i16), DataError> {
            let (file, group, index) = (&self.file, self.group, self.index);
            let reader =
                guarded(self.path, || file.get_row_group(group)?.get_column_reader(index))?;
            let schema = file.metadata().file_metadata().schema_descr();
            self.group += 1;
            match reader {
                ColumnReader::ByteArrayColumnReader(reader) => {
                    Ok((reader, schema.column(index).max_def_level()))
                }
                _ => Err(DataError::Parquet {
                    path: self.path.to_owned(),
                    cause: format!("row group {group} has another type of column {index}"),
                }),
            }
        }

        fn text(&self, row: usize, value: &ByteArray) -> Result<String, DataError> {
            if value.len() > LONGEST {
                return Err(DataError::TooLong { path: self.path.to_owned(), most: LONGEST });
            }
            match value.as_utf8() {
                Ok(text) => Ok(text.to_owned()),
                Err(_) => Err(self.refuse(row, "the text is not UTF-8")),
            }
        }

        fn refuse(&self, row: usize, cause: &str) -> DataError {
            DataError::Row { path: self.path.to_owned(), row, cause: cause.to_owned() }
        }
    }

    impl Iterator for Rows<'_> {
        type Item = Vec<Result<String, DataError>>;

        fn next(&mut self) -> Option<Self::Item> {
            let rows = self.read().unwrap_or_else(|e| Some(vec![Err(e)]));
            if rows.as_ref().is_some_and(|rows| rows.iter().any(Result::is_err)) {
                // Nothing follows an error.
                self.column = None;
                self.group = self.file.num_row_groups();
            }
            rows
        }
    }
}
