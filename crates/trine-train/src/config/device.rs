//! `train.device`: what computes the steps of a run.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What computes steps: `cpu`; `cuda` or `cuda:N`, an NVIDIA GPU; `emulator`, the kernels for a GPU on this
/// CPU, slowly, to see whether a run could be made on one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceConfig {
    /// This processor.
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
    /// What would be done on a GPU.
    Emulator,
}

impl FromStr for DeviceConfig {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            ("emulator", _) => Ok(Self::Emulator),
            (_, Some(Ok(index))) => Ok(Self::Cuda(index)),
            _ => Err(format!("expected cpu, cuda, cuda:N or emulator, found {name}")),
        }
    }
}

impl TryFrom<String> for DeviceConfig {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<DeviceConfig> for String {
    fn from(device: DeviceConfig) -> Self {
        device.to_string()
    }
}

impl fmt::Display for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(0) => write!(f, "cuda"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Emulator => write!(f, "emulator"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for name in ["cpu", "cuda", "cuda:3", "emulator"] {
            assert_eq!(name.parse::<DeviceConfig>().unwrap().to_string(), name);
        }
        assert_eq!("cuda:0".parse(), Ok(DeviceConfig::Cuda(0)));
        for name in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(name.parse::<DeviceConfig>().unwrap_err().contains("cuda:N"), "{name}");
        }
    }
}
