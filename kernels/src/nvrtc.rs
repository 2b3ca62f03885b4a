//! NVIDIA's run-time compiler, where this machine has it: emitted text to machine code, without a GPU.
//!
//! The library is opened when it is asked for, never linked, so that the program runs where there is none. Which one is
//! taken: the one that the caller names, else the one that the environment's `MOEPRESS_NVRTC` names, else the first of [`NAMES`] that the
//! system's loader finds. The only file that calls it, and unsafe for its sake: plain C functions that take and give plain C types.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::Library;
use rayon::prelude::*;

use crate::emit::{Image, Images, Kind};
use crate::{Error, Result};

/// What the system's loader is asked for, in this order: the 12.x releases before the newer ones, whose PTX older drivers refuse.
pub const NAMES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];

/// The variable of the environment that names a library.
pub const VARIABLE: &str = "MOEPRESS_NVRTC";

/// The newest PTX that is written: what drivers of CUDA 12.8 and later take.
const PTX: [u32; 2] = [8, 7];

/// Options of every compilation beside the architecture.
const OPTIONS: [&str; 2] = ["--std=c++17", "-default-device"];

type Program = *mut c_void;

/// An open NVRTC library.
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
    version: [i32; 2],
}

impl Nvrtc {
    /// Opens the library that is named, by `named` or by the environment, or the first of the usual ones; `None` if none is named and the
    /// system has none.
    ///
    /// # Errors
    ///
    /// [`Error::Nvrtc`] if a library that is named cannot be opened, or what was opened is no NVRTC.
    pub fn find(named: Option<&Path>) -> Result<Option<Self>> {
        let variable = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
        match named.map(Path::to_owned).or(variable) {
            Some(path) => Self::open(&path).map(Some),
            None => NAMES.iter().map(Path::new).find(|name| loads(name)).map(Self::open).transpose(),
        }
    }

    fn open(path: &Path) -> Result<Self> {
        let fail = |what: String| Error::Nvrtc { path: path.to_owned(), what };
        preload(path);
        // SAFETY: the initializers of NVRTC have no demands on who loads it.
        #[allow(unsafe_code)]
        let library = unsafe { Library::new(path) }.map_err(|error| fail(format!("is no library that can be opened: {error}")))?;
        let mut found = Self { library, path: path.to_owned(), version: [0; 2] };
        found.version = found.asked()?;
        Ok(found)
    }

    fn asked(&self) -> Result<[i32; 2]> {
        let [mut major, mut minor] = [0, 0];
        let version: Call<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> = self.call("nvrtcVersion")?;
        // SAFETY: two integers to write to.
        #[allow(unsafe_code)]
        self.succeed("nvrtcVersion", unsafe { version(&raw mut major, &raw mut minor) })?;
        Ok([major, minor])
    }

    /// Where it was found, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its release, such as `12.8`.
    pub fn version(&self) -> String {
        format!("{}.{}", self.version[0], self.version[1])
    }

    /// Whether this release compiles for all of `archs`.
    ///
    /// # Errors
    ///
    /// [`Error::Nvrtc`] with those that it does not know, or if the library does not say.
    pub fn check(&self, archs: &[&str]) -> Result<()> {
        let count: Call<unsafe extern "C" fn(*mut c_int) -> c_int> = self.call("nvrtcGetNumSupportedArchs")?;
        let list: Call<unsafe extern "C" fn(*mut c_int) -> c_int> = self.call("nvrtcGetSupportedArchs")?;
        let mut length = 0;
        // SAFETY: an integer to write to.
        #[allow(unsafe_code)]
        self.succeed("nvrtcGetNumSupportedArchs", unsafe { count(&raw mut length) })?;
        let mut numbers = vec![0; usize::try_from(length).unwrap_or(0)];
        // SAFETY: room for as many integers as it said that it writes.
        #[allow(unsafe_code)]
        self.succeed("nvrtcGetSupportedArchs", unsafe { list(numbers.as_mut_ptr()) })?;
        // `sm_90a` is a variant of 90.
        let number = |arch: &str| arch.trim_start_matches("sm_").trim_end_matches(char::is_alphabetic).parse::<c_int>().ok();
        let unknown: Vec<&str> =
            archs.iter().copied().filter(|arch| number(arch).is_none_or(|number| !numbers.contains(&number))).collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let what =
            format!("({}) does not compile for {}; take 12.8 or later, or leave them out of `archs`", self.version(), unknown.join(", "));
        Err(Error::Nvrtc { path: self.path.clone(), what })
    }

    /// A cubin for each of `archs`, and PTX for the drivers of what comes after them. The order is that of `archs`; the same library and
    /// source give the same bytes. Also gives what the compiler had to say: nothing, or warnings.
    ///
    /// # Errors
    ///
    /// [`Error::Nvrtc`] for an architecture that this release does not know, and with the compiler's log for a source that does not compile.
    pub fn images(&self, source: &str, archs: &[&str]) -> Result<(Images, Vec<String>)> {
        self.check(archs)?;
        let wanted = archs.iter().map(|arch| (*arch, Kind::Cubin)).chain([("compute_80", Kind::Ptx)]);
        let made: Vec<(Image, String)> =
            wanted.collect::<Vec<_>>().into_par_iter().map(|(arch, kind)| self.compile(source, arch, kind)).collect::<Result<_>>()?;
        let (mut compiled, mut said): (Vec<Image>, Vec<String>) = made.into_iter().unzip();
        said.retain(|log| !log.is_empty());
        let newer = compiled.last().and_then(|image| ptx_version(&image.bytes)).filter(|version| *version > PTX);
        let left_out = newer.map(|[major, minor]| {
            format!(
                "no PTX: NVRTC {} writes version {major}.{minor} of it, which drivers older than itself refuse; 12.8 writes 8.7",
                self.version()
            )
        });
        if left_out.is_some() {
            compiled.pop();
        }
        Ok((Images { compiled, left_out }, said))
    }

    fn compile(&self, source: &str, arch: &str, kind: Kind) -> Result<(Image, String)> {
        let fail = |what: String| Error::Nvrtc { path: self.path.clone(), what };
        let text = |text: &str| CString::new(text).map_err(|_| fail("a source with a zero byte in it".to_owned()));
        let (source, name) = (text(source)?, text("mq_moe.cu")?);
        let options: Vec<CString> = [format!("-arch={arch}").as_str()].into_iter().chain(OPTIONS).map(text).collect::<Result<_>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        type Names = *const *const c_char;
        let create: Call<unsafe extern "C" fn(*mut Program, *const c_char, *const c_char, c_int, Names, Names) -> c_int> =
            self.call("nvrtcCreateProgram")?;
        let run: Call<unsafe extern "C" fn(Program, c_int, Names) -> c_int> = self.call("nvrtcCompileProgram")?;
        let mut program = Held { nvrtc: self, program: std::ptr::null_mut() };
        // SAFETY: strings that end and live until the call is over; no headers.
        #[allow(unsafe_code)]
        let code = unsafe { create(&raw mut program.program, source.as_ptr(), name.as_ptr(), 0, std::ptr::null(), std::ptr::null()) };
        self.succeed("nvrtcCreateProgram", code)?;
        let count = c_int::try_from(options.len()).unwrap_or(0);
        // SAFETY: a program that was made above, and as many options as are counted.
        #[allow(unsafe_code)]
        let code = unsafe { run(program.program, count, options.as_ptr()) };
        let log = String::from_utf8_lossy(&program.take("nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?).trim().to_owned();
        if code != 0 {
            return Err(fail(format!("does not compile mq_moe.cu for {arch} (error {code}):\n{log}")));
        }
        let mut bytes = match kind {
            Kind::Cubin => program.take("nvrtcGetCUBINSize", "nvrtcGetCUBIN")?,
            Kind::Ptx => program.take("nvrtcGetPTXSize", "nvrtcGetPTX")?,
        };
        if kind == Kind::Ptx {
            bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        }
        Ok((Image { arch: arch.to_owned(), kind, bytes, nvrtc: self.version() }, log))
    }

    fn call<T>(&self, name: &str) -> Result<Call<'_, T>> {
        let missing = |error| Error::Nvrtc { path: self.path.clone(), what: format!("is no NVRTC that makes cubins: {error}") };
        // SAFETY: each type that is asked for is that of nvrtc.h.
        #[allow(unsafe_code)]
        unsafe { self.library.get(name.as_bytes()) }.map_err(missing)
    }

    fn succeed(&self, name: &str, code: c_int) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(Error::Nvrtc { path: self.path.clone(), what: format!("{name} fails with error {code}") }) }
    }
}

type Call<'a, T> = libloading::Symbol<'a, T>;

/// A program, destroyed when it is dropped.
struct Held<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Held<'_> {
    /// What a pair of functions has to give: the size, then the bytes.
    fn take(&self, size_of: &str, get: &str) -> Result<Vec<u8>> {
        let size: Call<unsafe extern "C" fn(Program, *mut usize) -> c_int> = self.nvrtc.call(size_of)?;
        let bytes: Call<unsafe extern "C" fn(Program, *mut c_char) -> c_int> = self.nvrtc.call(get)?;
        let mut length = 0;
        // SAFETY: a program that lives, and a number to write to.
        #[allow(unsafe_code)]
        self.nvrtc.succeed(size_of, unsafe { size(self.program, &raw mut length) })?;
        let mut found = vec![0_u8; length];
        // SAFETY: room for as many bytes as it said that it writes.
        #[allow(unsafe_code)]
        self.nvrtc.succeed(get, unsafe { bytes(self.program, found.as_mut_ptr().cast()) })?;
        while get == "nvrtcGetProgramLog" && found.last() == Some(&0) {
            found.pop();
        }
        Ok(found)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let nvrtc = self.nvrtc;
        if self.program.is_null() {
            return;
        }
        if let Ok(destroy) = nvrtc.call::<unsafe extern "C" fn(*mut Program) -> c_int>("nvrtcDestroyProgram") {
            // SAFETY: a program that was made and is not used again.
            #[allow(unsafe_code)]
            unsafe {
                destroy(&raw mut self.program);
            }
        }
    }
}

fn loads(name: &Path) -> bool {
    // SAFETY: the initializers of NVRTC have no demands on who loads it.
    #[allow(unsafe_code)]
    unsafe { Library::new(name) }.is_ok()
}

/// NVRTC asks the loader for its library of built-in functions by name alone: one that lies beside it, as in the wheel, has to be there first.
fn preload(path: &Path) {
    let Some(Ok(files)) = path.parent().filter(|dir| !dir.as_os_str().is_empty()).map(fs_err::read_dir) else { return };
    let builtins = |name: &str| name.starts_with("libnvrtc-builtins.so");
    let mut found: Vec<PathBuf> = files.filter_map(|file| Some(file.ok()?.path())).collect();
    found.retain(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(builtins));
    found.sort();
    for path in found {
        // SAFETY: as above. What does not load is missed, with a message, by the compiler itself.
        #[allow(unsafe_code)]
        if let Ok(library) = unsafe { Library::new(path) } {
            std::mem::forget(library);
        }
    }
}

/// The two numbers behind `.version`.
fn ptx_version(text: &[u8]) -> Option<[u32; 2]> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b".version "))?;
    let (major, minor) = std::str::from_utf8(line).ok()?.trim().split_once('.')?;
    Some([major.parse().ok()?, minor.parse().ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read() {
        assert_eq!(ptx_version(b"//\n// text\n.version 8.7\n.target sm_80\n"), Some([8, 7]));
        assert!(ptx_version(b".version 9.0\r\n") > Some(PTX));
        assert_eq!(ptx_version(b".target sm_80"), None);
    }

    #[test]
    fn a_library_that_is_named_has_to_be_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnvrtc.so.12");
        let said = || Nvrtc::find(Some(&path)).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said().contains("libnvrtc.so.12 is no library that can be opened"), "{}", said());
        fs_err::write(&path, "text").unwrap();
        assert!(said().contains("is no library that can be opened"), "{}", said());
    }

    /// The library that the environment names; says aloud that there is none.
    fn named() -> Option<Nvrtc> {
        if std::env::var_os(VARIABLE).is_none() {
            eprintln!("skipped: {VARIABLE} does not name a libnvrtc");
            return None;
        }
        Nvrtc::find(None).unwrap()
    }

    #[test]
    fn what_does_not_compile_comes_with_the_log() {
        let Some(nvrtc) = named() else { return };
        let said = nvrtc.images("__global__ void f() { not_there(); }", &["sm_80"]).unwrap_err().to_string();
        assert!(said.contains("does not compile mq_moe.cu for sm_80") && said.contains("\"not_there\" is undefined"), "{said}");
        assert!(
            nvrtc.images("", &["sm_80", "sm_20", "sm_1000a"]).unwrap_err().to_string().contains("does not compile for sm_20, sm_1000a")
        );
    }

    #[test]
    fn the_same_source_gives_the_same_bytes() {
        let Some(nvrtc) = named() else { return };
        let text = "extern \"C\" __global__ void f(float *x, int n) { for (int i = 0; i < n; i++) x[i] = x[n - i] * 2; }";
        let made = nvrtc.images(text, &["sm_90a", "sm_80"]).unwrap();
        assert_eq!(made, nvrtc.images(text, &["sm_90a", "sm_80"]).unwrap());
        let (Images { compiled, left_out }, said) = made;
        assert_eq!((left_out, said), (None, Vec::new()), "12.8 writes PTX 8.7 and warns of nothing");
        let files: Vec<String> = compiled.iter().map(Image::file).collect();
        assert_eq!(files, ["cubin/mq_moe.sm_90a.cubin", "cubin/mq_moe.sm_80.cubin", "ptx/mq_moe.compute_80.ptx"]);
        assert!(compiled[0].bytes.starts_with(b"\x7fELF") && compiled[0].bytes != compiled[1].bytes);
        assert_eq!(compiled[2].bytes.last(), Some(&b'\n'));
    }
}
