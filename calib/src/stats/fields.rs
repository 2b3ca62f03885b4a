//! A layer's statistics as named tensors: counts are U64, sums F64, little endian.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use ndarray::{Array, ArrayD, Dimension};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// A number that a field holds.
pub(super) trait Word: Copy {
    /// As it is stored.
    const DTYPE: Dtype;
    fn to_bytes(self) -> [u8; 8];
    fn from_bytes(bytes: [u8; 8]) -> Self;
}

impl Word for u64 {
    const DTYPE: Dtype = Dtype::U64;
    fn to_bytes(self) -> [u8; 8] {
        self.to_le_bytes()
    }
    fn from_bytes(bytes: [u8; 8]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

impl Word for f64 {
    const DTYPE: Dtype = Dtype::F64;
    fn to_bytes(self) -> [u8; 8] {
        self.to_le_bytes()
    }
    fn from_bytes(bytes: [u8; 8]) -> Self {
        Self::from_le_bytes(bytes)
    }
}

/// One tensor.
struct Field {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Named tensors.
#[derive(Default)]
pub(super) struct Fields {
    tensors: BTreeMap<String, Field>,
    /// The first that was asked for and is not there.
    missing: OnceLock<String>,
}

/// A statistic that is stored as fields below a name.
pub(super) trait Stored: Sized {
    /// Writes its fields; `at` ends in a dot.
    fn write(&self, at: &str, to: &mut Fields);

    /// Reads them; `None` where one is missing or of a shape that does not fit the others.
    fn read(at: &str, from: &Fields) -> Option<Self>;
}

impl Fields {
    pub fn put<T: Word, D: Dimension>(&mut self, name: String, values: &Array<T, D>) {
        let bytes = values.iter().flat_map(|v| v.to_bytes()).collect();
        self.tensors.insert(name, Field { dtype: T::DTYPE, shape: values.shape().to_vec(), bytes });
    }

    pub fn get<T: Word, D: Dimension>(&self, name: &str) -> Option<Array<T, D>> {
        if !self.tensors.contains_key(name) {
            self.missing.get_or_init(|| name.to_owned());
        }
        let field = self.tensors.get(name).filter(|f| f.dtype == T::DTYPE)?;
        let words: Vec<T> = field.bytes.chunks_exact(8).map(|w| w.try_into().ok().map(T::from_bytes)).collect::<Option<_>>()?;
        ArrayD::from_shape_vec(field.shape.clone(), words).ok()?.into_dimensionality().ok()
    }

    /// The first tensor that was asked for and is not there.
    pub fn missing(&self) -> Option<&str> {
        self.missing.get().map(String::as_str)
    }

    /// Whether any name begins so.
    pub fn has(&self, prefix: &str) -> bool {
        self.tensors.keys().any(|name| name.starts_with(prefix))
    }

    /// What stands between a prefix and a suffix in the names that have both.
    pub fn between(&self, prefix: &str, suffix: &str) -> impl Iterator<Item = &str> {
        self.tensors.keys().filter_map(move |name| name.strip_prefix(prefix)?.strip_suffix(suffix))
    }

    /// A statistic that may be absent altogether; `None` where it is there in part.
    pub fn optional<S: Stored>(&self, at: &str) -> Option<Option<S>> {
        if self.has(at) { S::read(at, self).map(Some) } else { Some(None) }
    }

    /// The bytes of a safetensors file.
    pub fn to_file(&self) -> Result<Vec<u8>, safetensors::SafeTensorError> {
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, field) in &self.tensors {
            views.push((name, TensorView::new(field.dtype, field.shape.clone(), &field.bytes)?));
        }
        safetensors::serialize(views, None)
    }

    /// The tensors of a safetensors file.
    pub fn from_file(bytes: &[u8]) -> Result<Self, safetensors::SafeTensorError> {
        let file = SafeTensors::deserialize(bytes)?;
        let field = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), Field { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() })
        };
        Ok(Self { tensors: file.iter().map(field).collect(), missing: OnceLock::new() })
    }
}

#[test]
fn numbers_come_back_with_their_shape() {
    use ndarray::{Array1, Array2, array};
    let mut fields = Fields::default();
    fields.put("a.counts".into(), &array![[1_u64, 2, 3]]);
    fields.put("a.sums".into(), &array![0.1, -2.5]);
    let fields = Fields::from_file(&fields.to_file().unwrap()).unwrap();
    assert_eq!(fields.get("a.counts"), Some(array![[1_u64, 2, 3]]));
    assert_eq!(fields.get("a.sums"), Some(array![0.1, -2.5]));
    assert_eq!(fields.get::<u64, ndarray::Ix1>("a.counts"), None::<Array1<u64>>);
    assert_eq!(fields.get("a.counts"), None::<Array2<f64>>);
    assert_eq!(fields.between("a.", "ms").collect::<Vec<_>>(), ["su"]);
}
