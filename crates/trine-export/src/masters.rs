//! A model as master weights, whatever it is stored as.

use half::bf16;
use trine_format::names::{Part, TensorId};
use trine_format::{BoxError, DenseTensor, Dtype, ModelFile, Quantization, TensorSource};
use trine_ternary::{Precision, TernaryError};

/// Serves the masters of a ternary model in a type, F32 or BF16 or that of the stored masters, such
/// that they quantize to exactly the trits and scales that the source has.
///
/// Stored masters that fit the type are passed on as they are. Others are rounded, and some moved
/// by a step where rounding alone would turn a trit or shift the scale. Trits that are stored
/// without masters get new ones ([`TernaryMatrix::to_masters`](trine_ternary::TernaryMatrix::to_masters)).
pub(crate) struct Masters<'a> {
    pub(crate) source: &'a ModelFile,
    pub(crate) dtype: Dtype,
}

impl TensorSource for Masters<'_> {
    fn dense(&self, name: &str) -> Result<DenseTensor<'_>, BoxError> {
        let Some(TensorId::Layer(layer, Part::Projection(p))) = TensorId::from_canonical(name)
        else {
            return Ok(self.source.dense(name)?);
        };
        let online = self.source.config().quantization == Quantization::Online;
        let stored = if online { Some(self.source.dense(name)?) } else { None };
        match stored {
            Some(masters) if masters.dtype == self.dtype || self.dtype == Dtype::F32 => {
                return Ok(masters);
            }
            _ => {}
        }
        let precision = match self.dtype {
            Dtype::F32 => Precision::F32,
            Dtype::BF16 => Precision::Bf16,
            other => return Err(format!("masters cannot be made as {}", other.name()).into()),
        };
        let matrix = TensorSource::projection(self.source, layer, p)?;
        let start = stored.map(|masters| masters.to_f32());
        let masters = matrix.to_masters(start.as_deref(), precision).map_err(|e| match e {
            TernaryError::Masters { scale } => format!(
                "no masters of bf16 have exactly the scale {scale} and these trits, as there is \
                 no zero that could hold a rest; f32 has them (--dtype f32)"
            )
            .into(),
            other => BoxError::from(other),
        })?;
        let data = match precision {
            Precision::F32 => masters.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>(),
            Precision::Bf16 => {
                masters.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect()
            }
        };
        let shape = vec![matrix.rows(), matrix.cols()];
        Ok(DenseTensor { name: name.to_owned(), dtype: self.dtype, shape, data: data.into() })
    }

    fn release(&self, name: &str) {
        self.source.release(name);
    }
}
