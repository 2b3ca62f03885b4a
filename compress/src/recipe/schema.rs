//! The JSON schema of a recipe, for editors: generated from the types.

/// The schema as it lies in `configs/recipe.schema.json`.
///
/// # Errors
///
/// None in practice; serializing a generated schema cannot fail but says so in its type.
pub fn schema() -> serde_json::Result<String> {
    let schema = schemars::generate::SchemaSettings::draft07().into_generator().into_root_schema_for::<super::Recipe>();
    Ok(serde_json::to_string_pretty(&schema)? + "\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_committed_schema_is_the_generated_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/recipe.schema.json");
        if std::env::var("INSTA_UPDATE").as_deref() == Ok("always") {
            fs_err::write(path, super::schema().unwrap()).unwrap();
        }
        let committed = fs_err::read_to_string(path).unwrap();
        assert!(committed == super::schema().unwrap(), "it has drifted: run `moepress schema > configs/recipe.schema.json`");
    }
}
