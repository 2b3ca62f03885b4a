//! Which backend a run uses.
//!
//! The CPU is burn's `flex` and always there. CUDA is behind the feature `cuda`; its libraries are opened when it is first
//! used, so one binary starts everywhere. Without a driver burn panics in a thread of its own: presence is checked before.

use std::fmt;
use std::str::FromStr;

use burn::tensor::backend::Backend;

use crate::{Error, Result};

/// The CPU backend.
pub type Cpu = burn_flex::Flex;

/// The CUDA backend.
#[cfg(feature = "cuda")]
pub type Cuda = burn::backend::Cuda<f32, i32>;

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    Cuda(usize),
    /// The first CUDA device where this build and this machine have one, else the CPU.
    #[default]
    Auto,
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let stranger = || Error::NoSuchDevice { name: name.to_owned() };
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            None if name == "auto" => Ok(Self::Auto),
            Some(("cuda", index)) => index.parse().map(Self::Cuda).map_err(|_| stranger()),
            _ => Err(stranger()),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

/// A device that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// The CUDA device of this number.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

/// Something to be done on a device, for whichever backend that is.
pub trait Job {
    /// What it gives.
    type Output;

    /// Does it.
    fn run<B: Backend>(self, device: &B::Device) -> Self::Output;
}

impl DeviceChoice {
    /// Finds the device.
    ///
    /// # Errors
    ///
    /// [`Error::NoCuda`] where a CUDA device was asked for by name and this build or this machine has none.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(index) => cuda(index),
            Self::Auto => Ok(cuda(0).unwrap_or(Device::Cpu)),
        }
    }
}

impl Device {
    /// Does a job on this device.
    pub fn run<J: Job>(self, job: J) -> J::Output {
        match self {
            Self::Cpu => job.run::<Cpu>(&Default::default()),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => job.run::<Cuda>(&burn::backend::cuda::CudaDevice::new(index)),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(index: usize) -> Result<Device> {
    Err(Error::NoCuda { index, reason: "this build has no CUDA (cargo build --release --features cuda)".to_owned() })
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Device> {
    use cudarc::driver::CudaContext;

    let no = |reason: String| Error::NoCuda { index, reason };
    // SAFETY: both only ask the loader whether a library can be opened; nothing is called in it.
    #[allow(unsafe_code)]
    let (driver, compiler) = unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::nvrtc::sys::is_culib_present()) };
    if !driver {
        return Err(no("the driver library libcuda is not on this machine".to_owned()));
    }
    if !compiler {
        return Err(no("libnvrtc, which compiles the kernels, is not on this machine (it is part of the CUDA toolkit)".to_owned()));
    }
    let count = CudaContext::device_count().map_err(|e| no(format!("the driver says {e:?}")))?;
    if index >= count.max(0) as usize {
        return Err(no(format!("the driver has {count} device(s), numbered from 0")));
    }
    Ok(Device::Cuda(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Name;
    impl Job for Name {
        type Output = String;
        fn run<B: Backend>(self, device: &B::Device) -> String {
            B::name(device)
        }
    }

    #[test]
    fn names_are_read_and_written() {
        for (name, choice) in
            [("cpu", DeviceChoice::Cpu), ("cuda", DeviceChoice::Cuda(0)), ("cuda:3", DeviceChoice::Cuda(3)), ("auto", DeviceChoice::Auto)]
        {
            assert_eq!(name.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string().parse::<DeviceChoice>().unwrap(), choice);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "cpu:0", "CUDA"] {
            let error = name.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(error.contains("cpu, cuda, cuda:N or auto"), "{error}");
        }
    }

    #[test]
    fn the_cpu_is_always_there() {
        assert_eq!(DeviceChoice::Cpu.open().unwrap().run(Name), "flex");
        assert!(DeviceChoice::Auto.open().is_ok());
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_and_not_a_panic() {
        let error = DeviceChoice::Cuda(4096).open().unwrap_err().to_string();
        assert!(error.contains("cuda:4096") && error.contains("--device cpu"), "{error}");
    }
}
