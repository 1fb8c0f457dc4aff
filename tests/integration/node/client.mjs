// The npm package "openai" against the API. Usage: node client.mjs URL MODEL; prints what it saw as JSON.
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const chat = { model, messages: [{ role: "user", content: "Hello" }], max_tokens: 8, temperature: 0 };
const schema = {
  type: "object",
  properties: { at: { enum: ["north", "south"] } },
  required: ["at"],
  additionalProperties: false,
};
const look = { type: "function", function: { name: "look", strict: true, parameters: schema } };
const seen = {};

seen.models = (await client.models.list()).data.map((one) => one.id);

const whole = await client.chat.completions.create(chat);
seen.whole = { text: whole.choices[0].message.content, tokens: whole.usage.total_tokens };

seen.streamed = { text: "" };
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ ...chat, ...options })) {
  seen.streamed.text += chunk.choices[0]?.delta?.content ?? "";
  seen.streamed.tokens = chunk.usage?.total_tokens;
}

const called = await client.chat.completions.create({
  ...chat, max_tokens: 100, tools: [look], tool_choice: "required", parallel_tool_calls: false,
});
const call = called.choices[0].message.tool_calls[0].function;
seen.call = { name: call.name, arguments: JSON.parse(call.arguments), reason: called.choices[0].finish_reason };

const format = { type: "json_schema", json_schema: { name: "place", strict: true, schema } };
const runner = client.chat.completions.stream({ ...chat, max_tokens: 100, response_format: format });
seen.json = JSON.parse((await runner.finalChatCompletion()).choices[0].message.content);

const completion = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 4, logprobs: 2 });
seen.logprobs = completion.choices.map((choice) => choice.logprobs.tokens.length);

seen.errors = [];
for (const wrong of [{ max_tokens: -1 }, { model: "nobody" }]) {
  try {
    await client.completions.create({ model, prompt: "a", ...wrong });
  } catch (error) {
    seen.errors.push([error.constructor.name, error.param ?? null, error.type]);
  }
}

seen.chunksBeforeLeaving = 0;
for await (const _ of await client.completions.create({ model, prompt: "a", max_tokens: 500, stream: true })) {
  if (++seen.chunksBeforeLeaving === 3) break;
}

console.log(JSON.stringify(seen));
