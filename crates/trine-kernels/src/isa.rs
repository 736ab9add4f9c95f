//! Which instruction set the kernels use.
//!
//! Decided once, at first use: the best that the CPU has, or the one that the environment variable
//! `TRINE_ISA` names. Forcing a lower one serves tests and comparisons; results do not depend on it.
//! A program calls [`select`] when it starts, to log the choice or to refuse a bad name politely.

use std::env;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use crate::arch;
use crate::packed::Packing;

/// The variable that forces an instruction set.
const VARIABLE: &str = "TRINE_ISA";

/// Instruction sets that kernels exist for, in increasing order on each architecture.
///
/// Every name exists on every machine; whether this machine has it, [`available`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust, on any CPU.
    Generic,
    /// x86-64 with AVX2: 256-bit `vpmaddubsw`.
    Avx2,
    /// x86-64 with AVX2 and AVX-VNNI: 256-bit `vpdpbusd`.
    AvxVnni,
    /// x86-64 with AVX-512 F, BW, DQ and VL: 512-bit `vpmaddubsw`.
    Avx512,
    /// x86-64 with AVX-512 as above and VNNI: 512-bit `vpdpbusd`.
    Avx512Vnni,
    /// x86-64 with AVX-512 as above, VNNI and VBMI: five trits of a byte come from a table.
    Avx512Vbmi,
    /// AArch64 with NEON: `smlal`, 16-bit sums of products.
    Neon,
    /// AArch64 with NEON and the dot products of ARMv8.2: `sdot`.
    NeonDot,
}

impl Isa {
    /// All instruction sets, in increasing order.
    pub const ALL: [Self; 8] = [
        Self::Generic,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vnni,
        Self::Avx512Vbmi,
        Self::Neon,
        Self::NeonDot,
    ];

    /// The name that `TRINE_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
        }
    }

    /// How trits are best held in memory for one-token products: in five a byte where they are
    /// unpacked about as fast as memory delivers them, in four elsewhere.
    ///
    /// On one Zen 5 core, in billions of trits a second out of a cache, of four and of five a byte:
    /// `avx2` 116 and 44, `avx512vnni` 244 and 110, `avx512vbmi` 244 and 231. Memory gave it 160
    /// and 200.
    pub fn packing(self) -> Packing {
        match self {
            Self::Avx512Vbmi => Packing::Trits5,
            _ => Packing::Bits2,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;

    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::ALL
            .into_iter()
            .find(|isa| isa.name() == name)
            .ok_or_else(|| IsaError::Unknown { name: name.to_owned() })
    }
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// No instruction set has this name.
    Unknown {
        /// The name that was given.
        name: String,
    },
    /// The CPU does not have it.
    Unavailable {
        /// The instruction set that was asked for.
        isa: Isa,
    },
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { name } => {
                let known = Isa::ALL.map(Isa::name).join(", ");
                write!(f, "unknown instruction set {name:?}: expected one of {known}")
            }
            Self::Unavailable { isa } => {
                let found: Vec<_> = available().into_iter().map(Isa::name).collect();
                write!(f, "this CPU does not have {isa}: it has {}", found.join(", "))
            }
        }
    }
}

impl std::error::Error for IsaError {}

/// The instruction sets that this CPU has, in increasing order; the first is [`Isa::Generic`].
pub fn available() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|&isa| arch::has(isa)).collect()
}

/// The instruction set in use, for a program to report when it starts.
///
/// # Errors
/// When `TRINE_ISA` names an instruction set that does not exist or that the CPU does not have.
pub fn select() -> Result<Isa, IsaError> {
    static SELECTED: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
    let forced = || env::var_os(VARIABLE).map(|name| name.to_string_lossy().into_owned());
    SELECTED.get_or_init(|| choose(forced().as_deref())).clone()
}

/// The instruction set in use.
///
/// Where [`select`] is an error, `TRINE_ISA` counts as unset: a kernel deep in a computation is no
/// place to discover a typing mistake, and the results are the same on every instruction set.
#[inline]
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| select().unwrap_or_else(|_| best()))
}

/// `forced` if it is usable; the best where nothing, or an empty string, is forced.
fn choose(forced: Option<&str>) -> Result<Isa, IsaError> {
    match forced {
        None | Some("") => Ok(best()),
        Some(name) => {
            let isa = name.parse()?;
            if arch::has(isa) { Ok(isa) } else { Err(IsaError::Unavailable { isa }) }
        }
    }
}

fn best() -> Isa {
    available().into_iter().max().unwrap_or(Isa::Generic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
    }

    #[test]
    fn only_a_table_in_registers_makes_five_trits_a_byte_worth_it() {
        let dense: Vec<_> =
            Isa::ALL.into_iter().filter(|isa| isa.packing() == Packing::Trits5).collect();
        assert_eq!(dense, [Isa::Avx512Vbmi]);
    }

    #[test]
    fn an_available_instruction_set_can_be_forced() {
        for isa in available() {
            assert_eq!(choose(Some(isa.name())), Ok(isa));
        }
        assert_eq!(choose(None), Ok(best()));
        assert_eq!(choose(Some("")), Ok(best()));
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_known_ones() {
        let error = choose(Some("AVX3")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown instruction set \"AVX3\": expected one of generic, avx2, avxvnni, avx512, \
             avx512vnni, avx512vbmi, neon, neondot"
        );
    }

    #[test]
    fn an_unavailable_instruction_set_is_refused() {
        for isa in Isa::ALL {
            let missing = !available().contains(&isa);
            assert_eq!(choose(Some(isa.name())) == Err(IsaError::Unavailable { isa }), missing);
        }
        let error = IsaError::Unavailable { isa: Isa::Avx2 }.to_string();
        assert!(error.starts_with("this CPU does not have avx2: it has generic"), "{error}");
    }
}
