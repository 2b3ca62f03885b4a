//! Machine code of the emitted kernels: what a recipe says of it, and the compiler that is taken.

use std::path::PathBuf;

use clap::ValueEnum;
use kernels::emit::Images;
use kernels::nvrtc::{NAMES, Nvrtc, VARIABLE};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;

/// A generation of NVIDIA's processors, as its compilers name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
pub enum Arch {
    /// A100.
    #[serde(rename = "sm_80")]
    #[value(name = "sm_80")]
    Sm80,
    /// A10, A40, RTX 30.
    #[serde(rename = "sm_86")]
    #[value(name = "sm_86")]
    Sm86,
    /// L4, L40, RTX 40.
    #[serde(rename = "sm_89")]
    #[value(name = "sm_89")]
    Sm89,
    /// H100, H200.
    #[serde(rename = "sm_90a")]
    #[value(name = "sm_90a")]
    Sm90a,
    /// B100, B200.
    #[serde(rename = "sm_100a")]
    #[value(name = "sm_100a")]
    Sm100a,
    /// RTX 50.
    #[serde(rename = "sm_120")]
    #[value(name = "sm_120")]
    Sm120,
}

impl Arch {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Sm80, Self::Sm86, Self::Sm89, Self::Sm90a, Self::Sm100a, Self::Sm120];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm86 => "sm_86",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
            Self::Sm100a => "sm_100a",
            Self::Sm120 => "sm_120",
        }
    }
}

/// Knobs of the emitted kernels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Kernels {
    /// Architectures to compile the kernels for, where there is an NVRTC library; beside their cubins goes PTX for later ones. Empty: the
    /// source alone is written, and the loader compiles it at first use.
    pub archs: Vec<Arch>,
    /// The NVRTC library, a path. Left out: what the environment's MOEPRESS_NVRTC names, else what the system's loader finds; where it finds
    /// none, nothing is compiled, and the manifest says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nvrtc: Option<PathBuf>,
}

impl Default for Kernels {
    fn default() -> Self {
        Self { archs: Arch::ALL.to_vec(), nvrtc: None }
    }
}

impl Kernels {
    fn names(&self) -> Vec<&'static str> {
        self.archs.iter().map(|arch| arch.name()).collect()
    }

    /// What is wrong with the compiler that would be taken; `None` if it can be used, or there is none and none is named.
    pub fn objection(&self) -> Option<String> {
        if self.archs.is_empty() {
            return None;
        }
        match Nvrtc::find(self.nvrtc.as_deref()).and_then(|found| found.map(|nvrtc| nvrtc.check(&self.names())).transpose()) {
            Ok(_) => None,
            Err(error) => Some(error.to_string()),
        }
    }

    /// The text compiled for every architecture asked for; without a compiler no image, and the reason. The compiler's warnings are told.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Codes`] if the library that is named is none, or the text does not compile, with the compiler's log.
    pub fn images(&self, source: &str) -> Result<Images> {
        if self.archs.is_empty() {
            return Ok(Images::none("no architecture was asked for"));
        }
        let Some(nvrtc) = Nvrtc::find(self.nvrtc.as_deref())? else {
            let names = NAMES.join(", ");
            let wheel = "pip install nvidia-cuda-nvrtc-cu12==12.8.93 brings one";
            return Ok(Images::none(format!(
                "no NVRTC library: none is named, {VARIABLE} is not set, and the system has none of {names}; {wheel}"
            )));
        };
        tracing::info!("compiling kernels for {} by NVRTC {}, {}", self.names().join(", "), nvrtc.version(), nvrtc.path().display());
        let (images, said) = nvrtc.images(source, &self.names())?;
        said.iter().for_each(|said| tracing::warn!("{}: {said}", nvrtc.path().display()));
        Ok(images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_named_and_not_there_is_an_objection_unless_nothing_is_compiled() {
        let named = |archs| Kernels { archs, nvrtc: Some("no/such/libnvrtc.so".into()) };
        assert!(named(vec![Arch::Sm80]).objection().unwrap().contains("no/such/libnvrtc.so is no library that can be opened"));
        assert!(named(vec![Arch::Sm80]).images("").unwrap_err().to_string().contains("no/such/libnvrtc.so"));
        assert_eq!(named(vec![]).objection(), None);
        assert_eq!(named(vec![]).images("").unwrap(), Images::none("no architecture was asked for"));
    }

    #[test]
    fn every_architecture_has_one_name() {
        for arch in Arch::ALL {
            assert_eq!(serde_json::to_value(arch).unwrap(), arch.name());
            assert_eq!(arch.to_possible_value().unwrap().get_name(), arch.name());
        }
    }
}
