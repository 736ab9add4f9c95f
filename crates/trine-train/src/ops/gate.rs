//! The gate of the feed-forward layer: `act(gate) * up`, elementwise.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;
use trine_format::HiddenAct;
use trine_kernels::nn;

use super::{contiguous, view};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 13;

/// `act(gate) * up`, all of one shape. `act` is squared ReLU (arXiv 2109.08668) or SiLU.
///
/// # Errors
/// Shapes that differ.
pub fn gate(gate: &Tensor, up: &Tensor, act: HiddenAct) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Gate { act })
}

struct Gate {
    act: HiddenAct,
}

impl Gate {
    /// Value and derivative of the activation at `g`.
    #[inline(always)]
    fn value_and_slope(&self, g: f32) -> (f32, f32) {
        match self.act {
            HiddenAct::Relu2 => {
                let positive = g.max(0.0);
                (positive * positive, 2.0 * positive)
            }
            HiddenAct::Silu => {
                let sigmoid = 1.0 / (1.0 + nn::exp(-g));
                (g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid)))
            }
        }
    }
}

impl CustomOp2 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (contiguous(gate, gate_layout)?, contiguous(up, up_layout)?);
        if gate_layout.shape() != up_layout.shape() {
            candle_core::bail!("gate: {:?} and {:?}", gate_layout.dims(), up_layout.dims());
        }
        let mut y = gate.to_vec();
        y.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(y, up)| match self.act {
            HiddenAct::Relu2 => nn::gate(nn::Gate::Relu2, y, up),
            HiddenAct::Silu => nn::gate(nn::Gate::Silu, y, up),
        });
        Ok((CpuStorage::F32(y), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (gates, ups, dys) = (view(gate)?, view(up)?, view(&dy)?);
        let (gates, ups, dys): (&[f32], &[f32], &[f32]) = (&gates, &ups, &dys);
        let (mut dgate, mut dup) = (vec![0.0; gates.len()], vec![0.0; gates.len()]);
        let chunks = gates.par_chunks(CHUNK).zip(ups.par_chunks(CHUNK)).zip(dys.par_chunks(CHUNK));
        dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK)).zip(chunks).for_each(
            |((dgate, dup), ((g, u), dy))| {
                for i in 0..g.len() {
                    let (value, slope) = self.value_and_slope(g[i]);
                    dgate[i] = dy[i] * u[i] * slope;
                    dup[i] = dy[i] * value;
                }
            },
        );
        let dgate = Tensor::from_vec(dgate, gate.shape(), gate.device())?;
        let dup = Tensor::from_vec(dup, up.shape(), up.device())?;
        Ok((Some(dgate), Some(dup)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{check, painted};
    use super::*;

    #[test]
    fn gates_match_composition() {
        let inputs = [painted((2, 3, 7), 1), painted((2, 3, 7), 2)];
        check(
            &inputs,
            |t| gate(&t[0], &t[1], HiddenAct::Relu2).unwrap(),
            |t| (t[0].relu().unwrap().sqr().unwrap() * &t[1]).unwrap(),
        );
        check(
            &inputs,
            |t| gate(&t[0], &t[1], HiddenAct::Silu).unwrap(),
            |t| (t[0].silu().unwrap() * &t[1]).unwrap(),
        );
    }
}
